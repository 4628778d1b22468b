"""A patch that makes Triton's interpreter a third faster.

The interpreter patches the whole language again at every call of a function; this skips what is patched already.
"""

import functools

from triton import language
from triton.runtime import interpreter


@functools.cache
def _languages(function):
    modules = {id(value) for value in function.__globals__.values()}
    return [module for module in (language, language.core) if id(module) in modules]


def _patch(function, patch=interpreter._patch_lang):
    if any(language.core.is_builtin(module.load) for module in _languages(function)):
        return patch(function)
    return interpreter._LangPatchScope()


interpreter._patch_lang = _patch
