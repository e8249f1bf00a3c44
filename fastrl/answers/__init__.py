"""Model text ↔ boxes, points and tracks, and their coordinate frames. Imports nothing heavy."""

from fastrl.answers.frames import (
    FRAMES,
    TASK_FRAME,
    View,
    check_frame,
    from_original,
    resolve_frame,
    to_original,
)
from fastrl.answers.items import MAX_ITEMS, Item, Parsed
from fastrl.answers.parse import parse_boxes, parse_points
from fastrl.answers.styles import (
    FAMILIES,
    STYLE_FRAME,
    STYLES,
    Style,
    matches_json_boxes,
    matches_qwen2_boxes,
    style_named,
    style_of,
)
from fastrl.answers.text import (
    answer_region,
    canonical,
    collapse_whitespace,
    plain_answer,
    strip_fence,
    strip_special_tokens,
    thought_tags,
    unfinished_thought,
)
from fastrl.answers.tracks import ParsedTracks, Track, format_tracks, matches_tracks, parse_tracks
from fastrl.answers.write import (
    as_track,
    check_style,
    format_answer,
    matches_format,
    matches_grounding_format,
    round_coords,
)

__all__ = [
    "FAMILIES",
    "FRAMES",
    "MAX_ITEMS",
    "STYLES",
    "STYLE_FRAME",
    "TASK_FRAME",
    "Item",
    "Parsed",
    "ParsedTracks",
    "Style",
    "Track",
    "View",
    "answer_region",
    "as_track",
    "canonical",
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
    "style_named",
    "style_of",
    "thought_tags",
    "to_original",
    "unfinished_thought",
]
