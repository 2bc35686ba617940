"""Secrets in text: keys, tokens, passwords, addresses with credentials. None may be written anywhere."""

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
"""Characters of a variable's value; what is shorter stands in ordinary text too."""


def secret_in(text: str) -> bool:
    """True where the text looks as if it held a secret. A git commit is none, nor is `$HF_TOKEN`."""
    return _SECRETS.search(text) is not None


def redacted(text: str) -> str:
    """The text without its secrets, and without the values of variables that hold some."""
    held = [
        value
        for name, value in os.environ.items()
        if name.upper().endswith(_NAMES) and len(value) >= _SHORTEST
    ]
    for value in sorted(held, key=len, reverse=True):
        text = text.replace(value, _HIDDEN)
    return _SECRETS.sub(_hide, text)


def _hide(match: re.Match[str]) -> str:
    return next(filter(None, match.groupdict().values()), "") + _HIDDEN
