"""How docstrings reach Markdown: shapes as [*, m, n] keep their star, a source of several lines is one paragraph."""

import re

import griffe

_REMARK = re.compile(r"^(Sources?|Notes?): (.*(?:\n {2,}\S.*)*)", re.MULTILINE)


class Docstrings(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_) -> None:
        if obj.docstring:
            text = obj.docstring.value.replace("[*", r"[\*")
            obj.docstring.value = _REMARK.sub(lambda found: f"\n*{found[1]}:* {' '.join(found[2].split())}\n", text)
