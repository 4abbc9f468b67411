"""Chats: what of a rendered conversation is trained."""

from __future__ import annotations

from .builder import ChatReader, datum_from_messages
from .encoding import Encoded, encode, encode_all
from .messages import Chat, read_chat
from .spans import Span, Spans

__all__ = ["Chat", "ChatReader", "Encoded", "Span", "Spans", "datum_from_messages", "encode", "encode_all", "read_chat"]
