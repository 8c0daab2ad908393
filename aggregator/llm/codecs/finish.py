"""Every provider's word for why an answer ended, in OpenAI's four."""

from __future__ import annotations

from aggregator.records import FinishReason

_WORDS: dict[FinishReason, tuple[str, ...]] = {
    "stop": ("stop", "eos", "end_turn", "stop_sequence", "pause_turn", "complete", "finish_reason_unspecified"),
    "length": (
        "length",
        "max_tokens",
        "max_output_tokens",
        "model_length",  # Mistral
        "model_context_window_exceeded",  # Anthropic
    ),
    "tool_calls": ("tool_calls", "tool_use", "tool_call", "function_call"),
    "content_filter": (
        "content_filter",
        "refusal",  # Anthropic
        "safety",
        "recitation",
        "language",
        "blocklist",
        "prohibited_content",
        "spii",
        "image_safety",
        "image_prohibited_content",
        "image_recitation",
        "model_armor",
    ),
}
REASONS: dict[str | None, FinishReason] = {word: reason for reason, words in _WORDS.items() for word in words}
REASONS |= {word.upper(): reason for word, reason in REASONS.items() if word}  # Gemini shouts


def finish_reason(word: str | None) -> FinishReason:
    """Normalise a provider's word; an unknown one, or none, reads as `stop` (the word stays in `raw_finish_reason`).

    >>> finish_reason("MAX_TOKENS"), finish_reason("end_turn"), finish_reason(None)
    ('length', 'stop', 'stop')
    """
    return REASONS.get(word, "stop")
