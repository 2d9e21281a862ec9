"""Reasoning effort: the texts that ask a thinking model to think more."""

from typing import Literal

from localv4.errors import UsageError

Effort = Literal["low", "high", "max"]
Release = Literal["preview", "0731"]

_THOROUGH = (
    "Reasoning Effort: Absolute maximum with no shortcuts permitted.\n"
    "You MUST be very thorough in your thinking and comprehensively decompose the problem to "
    "resolve the root cause, rigorously stress-testing your logic against all potential paths, "
    "edge cases, and adversarial scenarios.\n"
    "Explicitly write out your entire deliberation process, documenting every intermediate step, "
    "considered alternative, and rejected hypothesis to ensure absolutely no assumption is left "
    "unchecked.\n\n"
)
_EXHAUSTIVE = (
    "Reasoning Effort: Beyond maximum — exhaustive, relentless, and uncompromising.\n"
    "You MUST reason with the utmost depth and rigor, leaving absolutely nothing to chance: "
    "exhaustively decompose the problem into its most fundamental components, trace every causal "
    "chain to its root, and resolve the underlying cause rather than any surface symptom.\n"
    "Do not stop reasoning until you have independently verified the solution from multiple angles "
    "and are certain that no assumption remains unchecked and no error remains undiscovered.\n\n"
)

# The same text means "max" to the releases of April 2026 and "high" to those of July and August.
_TEXTS: dict[Release, dict[Effort, str]] = {
    "preview": {"high": "", "max": _THOROUGH},
    "0731": {"low": "", "high": _THOROUGH, "max": _EXHAUSTIVE},
}
# Names that OpenAI-style clients use, from the least effort to the most.
_RANKS = ("minimal", "low", "medium", "high", "xhigh", "max")


def effort_text(effort: Effort | None, release: Release) -> str:
    """Return what stands after BOS; empty for None. Raise UsageError if a release lacks the level.

    Source: section 2 of the format description; the official default without a level is no text.
    """
    if effort is None:
        return ""
    if effort not in _TEXTS[release]:
        known = " and ".join(_TEXTS[release])
        raise UsageError(
            f"--think-effort {effort} is unknown to the {release} release of the model",
            hint=f"it knows {known}",
        )
    return _TEXTS[release][effort]


def choose_effort(name: str, release: Release) -> Effort:
    """Return the level of `release` that a client means by `name`; raise UsageError if unknown.

    Levels between two that exist go to the lower one, except that the preview release has no
    `low`: its least effort, `high`, adds no text either.
    """
    if name not in _RANKS:
        raise UsageError(f"--think-effort {name} is not one of {', '.join(_RANKS)}")
    if name == "max":
        return "max"
    if release == "preview" or name in ("high", "xhigh"):
        return "high"
    return "low"
