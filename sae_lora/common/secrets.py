"""Secrets in text (keys, tokens, passwords, addresses with credentials): detected and hidden."""

import os
import re

_SECRETS = re.compile(
    r"""
    (?P<address>://[^\s/:@]*:)(?!\*\*\*)[^\s/@]+(?=@)
    | \b(?:hf_|gh[pousr]_|github_pat_|sk-|wandb_v1_)[\w-]{16,}
    | (?P<bearer>\b[Bb]earer\s+)[\w.~+/-]{8,}=*
    | (?P<variable>\b(?:\w*_)?(?:TOKEN|KEY|SECRET|PASSWORD)\s*=\s*["']?)(?!\$|\*\*\*)[^\s"',;&}]+
    | (?P<name>\b(?i:api_?key|access_?key|(?:api|access|auth)_?token|token|secret|password)=["']?)
      (?!\$|\*\*\*)[^\s"',;&}]{8,}
    """,
    re.VERBOSE,
)
_HIDDEN = "***"
_NAMES = ("KEY", "TOKEN", "SECRET", "PASSWORD")
_SHORTEST = 8
"""Shortest value of a variable to hide, in characters: shorter values occur in ordinary text too."""


def secret_in(text: str) -> bool:
    """True if the text seems to contain a secret. A git commit or `$HF_TOKEN` is not a secret."""
    return _SECRETS.search(text) is not None


def redacted(text: str) -> str:
    """The text without secrets, and without the values of environment variables that contain some."""
    values = [
        value
        for name, value in os.environ.items()
        if name.upper().endswith(_NAMES) and len(value) >= _SHORTEST
    ]
    for value in sorted(values, key=len, reverse=True):
        text = text.replace(value, _HIDDEN)
    return _SECRETS.sub(_hide, text)


def _hide(match: re.Match[str]) -> str:
    return next(filter(None, match.groupdict().values()), "") + _HIDDEN
