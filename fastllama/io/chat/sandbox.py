"""Runs chat templates as untrusted code: in jinja2's sandbox, with a budget of work and one-line errors.

The environment matches that of transformers (apply_chat_template, 5.23): `trim_blocks`, `lstrip_blocks`, break and
continue, `{% generation %}`, `tojson` without HTML escapes, `strftime_now`, `raise_exception`. It is stricter: an
attribute that the sandbox forbids is an error even if it is only printed, and a rendering has a limited number of loop
steps and characters.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache, wraps
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateSyntaxError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from fastllama.errors import CheckpointError
from fastllama.io.chat.errors import ConversationRefusedError, TemplateBudgetError

_STEPS = 200_000  # base budget of a rendering, in loop steps and characters: a second or two
_STEPS_PER_CHARACTER = 100  # added to the budget for each character of the input


@dataclass
class Rendering:
    """One run of a template: its remaining budget, the undefined names that it printed, the sizes of its containers.

    sizes: by id(), with the container itself, so that no other object gets the same id.
    """

    budget: int
    undefined: set[str] = field(default_factory=set)
    sizes: dict[int, tuple[Any, int]] = field(default_factory=dict)

    def size(self, value: Any) -> int:
        """Characters and elements of a value, nested values included, each as often as it occurs."""
        if isinstance(value, str):
            return len(value)
        if not isinstance(value, (list, tuple, dict)):
            return 0
        if id(value) not in self.sizes:
            parts = [*value, *value.values()] if isinstance(value, dict) else value
            self.sizes[id(value)] = value, len(value) + sum(map(self.size, parts))
        return self.sizes[id(value)][1]


_MULTIPLIES = {"replace", "join", "indent", "wordwrap", "expandtabs"}  # repeat one argument once per element of another
_FORMATS = {"format", "format_map"}  # their text may contain widths

_RENDERING: ContextVar[Rendering] = ContextVar("rendering")


def render(source: str, file: str, variables: Mapping[str, Any], characters: int) -> tuple[str, set[str]]:
    """The rendered text, and the undefined names that were rendered as nothing.

    file: the template's file, for errors. characters: length of the text in the variables, which adds to the budget.
    Raises ConversationRefusedError with the template's own message, CheckpointError for every other failure.
    """
    run = Rendering(_STEPS + _STEPS_PER_CHARACTER * characters)
    token = _RENDERING.set(run)
    try:
        return _compiled(source).render(variables), run.undefined
    except ConversationRefusedError as error:
        raise ConversationRefusedError(f"{file}: the chat template refuses it: {_words(error)}") from None
    except TemplateSyntaxError as error:
        raise CheckpointError(f"{file}: the chat template is broken at line {error.lineno}: {_words(error)}") from None
    except RecursionError:
        raise TemplateBudgetError(f"{file}: the chat template is nested or recurses too deeply") from None
    except TemplateBudgetError:
        raise TemplateBudgetError(f"{file}: the chat template loops or grows beyond reason") from None
    except Exception as error:  # untrusted code can raise anything
        raise CheckpointError(f"{file}: the chat template fails: {_words(error)}") from None
    finally:
        _RENDERING.reset(token)


class TemplateSandbox(ImmutableSandboxedEnvironment):
    """The sandbox; loop steps, macro calls and operations that grow a text are charged to the budget."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def spend(self, amount: int) -> bool:
        """Charge this rendering's budget. Returns True, for use in a condition."""
        run = _RENDERING.get()
        run.budget -= amount
        if run.budget < 0:
            raise TemplateBudgetError
        return True

    def joined(self, *values: Any) -> str:
        """The operator ~."""
        texts = [str(value) for value in values]
        self.spend(sum(map(len, texts)))
        return "".join(texts)

    def made(self, value: Any) -> Any:
        """A new value, after charging its size."""
        self.spend(_RENDERING.get().size(value))
        return value

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Call a function, method or macro; charges the size of its arguments and of its result."""
        owner = getattr(getattr(__obj, "__wrapped__", __obj), "__self__", None)  # jinja2 wraps str.format
        if owner is __self:  # inserted by BudgetedNodes
            return super().call(__context, __obj, *args, **kwargs)
        # Names that begin with an underscore are jinja2's.
        named = [value for name, value in kwargs.items() if not name.startswith("_")]
        given = [*([owner] if isinstance(owner, (str, int)) else []), *args, *named]
        __self.spend(_cost(getattr(__obj, "__name__", ""), given))
        return __self.made(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """The intercepted operators; the size of the result is charged before it is computed."""
        sizes = [_size(value) for value in (left, right)]
        numbers = [value for value in (left, right) if isinstance(value, int)]
        if operator == "+":
            self.spend(sum(sizes))
        elif len(numbers) == 1 and operator == "*":  # a text or list, repeated
            self.spend(max(0, numbers[0]) * max(sizes))
        elif len(numbers) == 2:  # in bits
            low, high = abs(left).bit_length(), abs(right).bit_length() if operator == "*" else max(0, right)
            self.spend(low + high if operator == "*" else low * high)
        elif operator == "%":
            self.spend(_cost("format", [left, *(right if isinstance(right, tuple) else [right])]))
        return self.made(super().call_binop(context, operator, left, right))

    def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
        """Forbidden attributes raise, where plain jinja2 would render them as nothing."""
        raise SecurityError(f"the attribute {attribute!r} of a {type(obj).__name__} is forbidden in templates")


class BudgetedNodes(NodeTransformer):
    """Inserts budget charges into a template's syntax tree: for each loop step and each macro call."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        """A step costs 1 and the literal text that it may print."""
        self._pay(node)
        if node.test is not None:
            node.test = nodes.And(_call("spend", nodes.Const(1)), node.test)
        return node

    def visit_Macro(self, node: nodes.Macro) -> nodes.Macro:
        """As a step."""
        self._pay(node)
        return node

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.CallBlock:
        """As a step."""
        self._pay(node)
        return node

    def visit_List(self, node: nodes.List) -> nodes.Call:
        """A list can contain another one twice, and so grow faster than its loops are charged."""
        self.generic_visit(node)
        return _call("made", node)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Call:
        """As a list."""
        self.generic_visit(node)
        return _call("made", node)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        """As a list, but not as the target of an assignment."""
        self.generic_visit(node)
        return _call("made", node) if node.ctx == "load" else node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Call:
        """The operator ~, which jinja2's sandbox cannot intercept."""
        self.generic_visit(node)
        return _call("joined", *node.nodes)

    def _pay(self, node: nodes.For | nodes.Macro | nodes.CallBlock) -> None:
        self.generic_visit(node)
        cost = 1 + sum(len(literal.data) for literal in node.find_all(nodes.TemplateData))
        node.body.insert(0, nodes.ExprStmt(_call("spend", nodes.Const(cost))))


class GenerationTag(Extension):
    """`{% generation %}`: marks the text that training is on; renders its content."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own declaration

    def parse(self, parser: Parser) -> nodes.Node:
        """The enclosed statements, in a scope of their own."""
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class TemplateNamespace(Namespace):
    """A template's `namespace()`, without names that begin with an underscore."""

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(_public(name), value)


class DictMaker:
    """A template's `dict`, without the class's methods, which would mutate their first argument."""

    fromkeys = staticmethod(dict.fromkeys)

    def __call__(self, *args: Any, **items: Any) -> dict[Any, Any]:
        return dict(*args, **items)


@lru_cache(maxsize=16)
def _compiled(source: str) -> jinja2.Template:
    environment = TemplateSandbox(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[GenerationTag, loopcontrols],
        finalize=_printed,
    )
    environment.filters["tojson"] = _to_json
    environment.filters = {name: _paid(environment, name, each) for name, each in environment.filters.items()}
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": lambda format: datetime.now().strftime(format),
        "namespace": lambda *args, **names: TemplateNamespace({_public(k): v for k, v in dict(*args, **names).items()}),
        "dict": DictMaker(),
    }
    del environment.globals["lipsum"]  # random words, of any length
    tree = BudgetedNodes().visit(environment.parse(source)).set_environment(environment)
    return jinja2.Template.from_code(environment, environment.compile(tree), environment.make_globals(None))


@jinja2.pass_context
def _printed(context: Context, value: Any) -> str:
    run = _RENDERING.get()
    if isinstance(value, jinja2.Undefined) and value._undefined_name is not None:  # None: an `if` without `else`
        run.undefined.add(str(value._undefined_name))
    return context.environment.joined(value)  # type: ignore[attr-defined]


def _raise_exception(message: Any) -> NoReturn:
    raise ConversationRefusedError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _public(name: Any) -> Any:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot hold {name!r}: the name begins with an underscore")
    return name


def _call(method: str, *args: nodes.Expr) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(method), list(args), [], None, None)


def _paid(environment: TemplateSandbox, name: str, filter: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that charges the size of its arguments and of its result."""

    @wraps(filter)  # also copies jinja2's mark for filters that take a context or the environment
    def run(*args: Any, **kwargs: Any) -> Any:
        environment.spend(_cost(name, [*args, *kwargs.values()]))
        return environment.made(filter(*args, **kwargs))

    return run


def _cost(name: str, given: Sequence[Any]) -> int:
    """The cost of a call, estimated from its arguments: their lengths, and numbers, which may become lengths."""
    sizes = sorted(abs(value) if isinstance(value, int) else _size(value) for value in given)
    cost = sum(sizes)
    if name in _MULTIPLIES and len(sizes) > 1:
        cost += sizes[-1] * sizes[-2]
    if name in _FORMATS:
        widths = re.findall(r"\d{3,}", " ".join(value for value in given if isinstance(value, str)))
        cost += sum(int(width[:9]) for width in widths)
    return cost


def _size(value: Any) -> int:
    return len(value) if isinstance(value, (str, Sequence)) else 0


def _words(error: Exception) -> str:
    """An exception's message, as one printable line."""
    text = " ".join((str(error) or type(error).__name__).split())
    return "".join(c for c in text if c.isprintable())[:300]
