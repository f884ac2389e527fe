"""Chat templates run as programs of strangers: jinja2's sandbox, a budget of work, and one line when one fails.

The environment offers what transformers' does (apply_chat_template, 5.23): `trim_blocks`, `lstrip_blocks`, break and
continue, `{% generation %}`, `tojson` without HTML escapes, `strftime_now`, `raise_exception`. Stricter than there:
an attribute that the sandbox forbids is an error even if it is only printed, and a rendering may spend a limited
number of loop steps and characters.
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

_STEPS = 200_000  # loop steps and characters that any rendering may spend: a second or two
_STEPS_PER_CHARACTER = 100  # and for each character of what is rendered


@dataclass
class Rendering:
    """One run of a template: what it may still spend, the undefined names that it printed, the sizes of its containers.

    sizes: by id, each with its container, so that no other object gets the id.
    """

    budget: int
    undefined: set[str] = field(default_factory=set)
    sizes: dict[int, tuple[Any, int]] = field(default_factory=dict)

    def size(self, value: Any) -> int:
        """Characters and elements of a value, all that is nested in it included as often as it stands there."""
        if isinstance(value, str):
            return len(value)
        if not isinstance(value, (list, tuple, dict)):
            return 0
        if id(value) not in self.sizes:
            parts = [*value, *value.values()] if isinstance(value, dict) else value
            self.sizes[id(value)] = value, len(value) + sum(map(self.size, parts))
        return self.sizes[id(value)][1]


_MULTIPLIES = {"replace", "join", "indent", "wordwrap", "expandtabs"}  # one argument as often as another is long
_FORMATS = {"format", "format_map"}  # widths stand in their text

_RENDERING: ContextVar[Rendering] = ContextVar("rendering")


def render(source: str, file: str, variables: Mapping[str, Any], characters: int) -> tuple[str, set[str]]:
    """The text of a template, and the undefined names that it printed as nothing.

    file: where the template lies, for errors. characters: how much text the variables hold, which the budget grows by.
    Raises ConversationRefusedError with the template's words, CheckpointError for every other failure.
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
        raise TemplateBudgetError(f"{file}: the chat template is nested or calls itself too deeply") from None
    except TemplateBudgetError:
        raise TemplateBudgetError(f"{file}: the chat template loops or grows beyond reason") from None
    except Exception as error:  # whatever a stranger's program can raise
        raise CheckpointError(f"{file}: the chat template fails: {_words(error)}") from None
    finally:
        _RENDERING.reset(token)


class TemplateSandbox(ImmutableSandboxedEnvironment):
    """The sandbox, whose loops, calls of macros, and operations that make text grow are paid for from the budget."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def spend(self, amount: int) -> bool:
        """Take from the budget of this rendering. True, so that it can stand in a condition."""
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
        """A new value, paid for."""
        self.spend(_RENDERING.get().size(value))
        return value

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """A call of a function, method or macro, paid for by what it is given and what it makes."""
        owner = getattr(getattr(__obj, "__wrapped__", __obj), "__self__", None)  # jinja2 wraps a text's format
        if owner is __self:  # of ours, put in by BudgetedNodes
            return super().call(__context, __obj, *args, **kwargs)
        named = [value for name, value in kwargs.items() if not name.startswith("_")]  # jinja2's own are
        given = [*([owner] if isinstance(owner, (str, int)) else []), *args, *named]
        __self.spend(_cost(getattr(__obj, "__name__", ""), given))
        return __self.made(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """The intercepted operators, paid for by the size of what they make, before they make it."""
        sizes = [_size(value) for value in (left, right)]
        numbers = [value for value in (left, right) if isinstance(value, int)]
        if operator == "+":
            self.spend(sum(sizes))
        elif len(numbers) == 1 and operator == "*":  # a text or list, so many times
            self.spend(max(0, numbers[0]) * max(sizes))
        elif len(numbers) == 2:  # in bits
            low, high = abs(left).bit_length(), abs(right).bit_length() if operator == "*" else max(0, right)
            self.spend(low + high if operator == "*" else low * high)
        elif operator == "%":
            self.spend(_cost("format", [left, *(right if isinstance(right, tuple) else [right])]))
        return self.made(super().call_binop(context, operator, left, right))

    def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
        """Forbidden attributes end the rendering, where jinja2 alone would print them as nothing."""
        raise SecurityError(f"the attribute {attribute!r} of a {type(obj).__name__} is not for templates")


class BudgetedNodes(NodeTransformer):
    """Puts the payments into a template's syntax tree: one for each step of a loop and each call of a macro."""

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
        """A list can hold another twice, and so grow beyond what its loops cost."""
        self.generic_visit(node)
        return _call("made", node)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Call:
        """As a list."""
        self.generic_visit(node)
        return _call("made", node)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        """As a list, but not where it names what is assigned."""
        self.generic_visit(node)
        return _call("made", node) if node.ctx == "load" else node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Call:
        """The operator ~ is no operator that the sandbox could intercept."""
        self.generic_visit(node)
        return _call("joined", *node.nodes)

    def _pay(self, node: nodes.For | nodes.Macro | nodes.CallBlock) -> None:
        self.generic_visit(node)
        cost = 1 + sum(len(literal.data) for literal in node.find_all(nodes.TemplateData))
        node.body.insert(0, nodes.ExprStmt(_call("spend", nodes.Const(cost))))


class GenerationTag(Extension):
    """`{% generation %}`: marks what the model is trained on; rendered, it is what it encloses."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own declaration

    def parse(self, parser: Parser) -> nodes.Node:
        """The enclosed statements, in a scope of their own."""
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class TemplateNamespace(Namespace):
    """`namespace()` of a template, without names that begin with an underscore."""

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(_public(name), value)


class DictMaker:
    """`dict` of a template, without the methods of the class, which would change their first argument."""

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
    del environment.globals["lipsum"]  # random words, as many as one asks for
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
    """A filter that is paid for by what it is given and what it makes."""

    @wraps(filter)  # and its mark for jinja2, which passes it a context or the environment first
    def run(*args: Any, **kwargs: Any) -> Any:
        environment.spend(_cost(name, [*args, *kwargs.values()]))
        return environment.made(filter(*args, **kwargs))

    return run


def _cost(name: str, given: Sequence[Any]) -> int:
    """What a call may take, told from its arguments: their lengths, and numbers, which may be lengths to come."""
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
    """What an exception says, in one line that a terminal can show."""
    text = " ".join((str(error) or type(error).__name__).split())
    return "".join(c for c in text if c.isprintable())[:300]
