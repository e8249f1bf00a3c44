"""Model text ↔ boxes, points and tracks, and the coordinate frames their numbers live in. Imports nothing heavy."""

from fastrl.answers.frames import (
    FRAMES,
    STYLE_FRAME,
    TASK_FRAME,
    View,
    check_frame,
    from_original,
    resolve_frame,
    to_original,
)
from fastrl.answers.parse import MAX_ITEMS, Item, Parsed, parse_boxes, parse_points
from fastrl.answers.text import answer_region, collapse_whitespace, plain_answer, strip_fence, strip_special_tokens
from fastrl.answers.tracks import ParsedTracks, Track, format_tracks, matches_tracks, parse_tracks
from fastrl.answers.write import (
    STYLES,
    as_track,
    check_style,
    format_answer,
    matches_format,
    matches_grounding_format,
    matches_json_boxes,
    matches_qwen2_boxes,
    round_coords,
)

__all__ = [
    "FRAMES",
    "MAX_ITEMS",
    "STYLES",
    "STYLE_FRAME",
    "TASK_FRAME",
    "Item",
    "Parsed",
    "ParsedTracks",
    "Track",
    "View",
    "answer_region",
    "as_track",
    "check_frame",
    "check_style",
    "collapse_whitespace",
    "format_answer",
    "format_tracks",
    "from_original",
    "matches_format",
    "matches_grounding_format",
    "matches_json_boxes",
    "matches_qwen2_boxes",
    "matches_tracks",
    "parse_boxes",
    "parse_points",
    "parse_tracks",
    "plain_answer",
    "resolve_frame",
    "round_coords",
    "strip_fence",
    "strip_special_tokens",
    "to_original",
]
