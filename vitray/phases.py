"""What a run does at a moment."""

from __future__ import annotations

from enum import StrEnum


class Phase(StrEnum):
    """The parts of a run, in their order and in the words of its progress view."""

    STARTING = "starting"
    READING_SOURCE = "reading the source"
    OPENING_MODEL = "opening the model"
    TIMING_ENGINES = "timing engines"
    COMPUTING = "computing"
    FINISHING = "writing the manifest"
