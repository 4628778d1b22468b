"""How docstrings reach Markdown.

Shapes as [*, m, n] keep their star, and an item that begins with > is no quotation. A source of several lines is one
paragraph. A class without a docstring has that of its base.
"""

import re

import griffe

_REMARK = re.compile(r"^(Sources?|Notes?):\s+(\S.*(?:\n {2,}\S.*)*)", re.MULTILINE)
_QUOTATION = re.compile(r"^( +\w+: |)>(?!>>)", re.MULTILINE)


class Docstrings(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_) -> None:
        if obj.docstring:
            text = _QUOTATION.sub(r"\1\>", obj.docstring.value.replace("[*", r"[\*"))
            obj.docstring.value = _REMARK.sub(lambda found: f"\n*{found[1]}:* {' '.join(found[2].split())}\n", text)

    def on_class(self, *, cls: griffe.Class, **_) -> None:
        bases = [cls.module.members.get(str(base)) for base in cls.bases]
        if cls.docstring is None and bases and bases[0]:
            cls.docstring = bases[0].docstring
