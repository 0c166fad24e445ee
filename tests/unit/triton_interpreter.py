"""Triton's interpreter as this project's kernels need it. To be mended before a kernel is launched."""

from __future__ import annotations

from typing import Any

import triton.runtime.interpreter as interpreter


def mend() -> None:
    """Let it work with newer numpy, which makes no number of an array (1,), and take three quarters of its time."""
    plain_tensor, plain_lang = interpreter._patch_lang_tensor, interpreter._patch_lang
    patched: set[str] = set()

    def patch_tensor(tensor: Any, *others: Any) -> None:
        plain_tensor(tensor, *others)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    def patch_lang(function: Any) -> Any:
        # Triton does it for each launch, and each call in a kernel
        if function.__module__ not in patched:
            patched.add(function.__module__)
            plain_lang(function)
        return interpreter._LangPatchScope()  # restores nothing

    interpreter._patch_lang_tensor, interpreter._patch_lang = patch_tensor, patch_lang
