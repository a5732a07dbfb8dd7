"""Fixtures that several files of this folder use."""

from __future__ import annotations

from support.command_line import dataset, labelled, vitray
from support.photo_folders import photos

__all__ = ["dataset", "labelled", "photos", "vitray"]
