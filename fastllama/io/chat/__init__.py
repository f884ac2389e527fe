"""Conversations to token ids: which chat format a checkpoint wants is chosen here, in one place.

`chat_format` chooses: the checkpoint's own template (template.py), Meta's format of Llama 2 (llama2.py), or plain text
(plain.py). A template is a program by a stranger, so it runs in sandbox.py; what of it a message must not hold is found
out in markers.py.
"""

from fastllama.io.chat.choice import ChatFormat, chat_format, check_chat_format, encode_chat
from fastllama.io.chat.messages import Message
from fastllama.io.chat.whole import TAGS

__all__ = ["TAGS", "ChatFormat", "Message", "chat_format", "check_chat_format", "encode_chat"]
