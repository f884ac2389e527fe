"""Conversations to token ids, in the chat format that a checkpoint was trained on.

`chat_format` chooses: the checkpoint's own template (template.py), Meta's format of Llama 2 (llama2.py), or plain text
(plain.py). A template is untrusted code, so it runs in sandbox.py; markers.py finds the tags that a message must not
contain.
"""

from fastllama.io.chat.choice import ChatFormat, chat_format, check_chat_format, encode_chat
from fastllama.io.chat.messages import Message
from fastllama.io.chat.whole import TAGS

__all__ = ["TAGS", "ChatFormat", "Message", "chat_format", "check_chat_format", "encode_chat"]
