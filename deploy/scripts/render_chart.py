#!/usr/bin/env python3
"""Renders the Helm chart where helm is not at hand: the part of Go's templates that our chart uses.

  render_chart.py CHART [-f VALUES.yaml]... [--set a.b=YAML]...

Values are checked against values.schema.json (package jsonschema). What this does not know is an error, never
skipped; `helm template` stays the judge.
"""
import argparse
import hashlib
import json
import pathlib
import re
import sys

import yaml

TOKEN = re.compile(r'"[^"]*"|\(|\)|\||:=|,|[^\s()|,"]+')


def split(text):
    """Go's template text as a list of ("text", t) and ("do", action), white space trimmed as {{- and -}} say."""
    parts, at = [], 0
    for match in re.finditer(r"\{\{(-?)\s*(.*?)\s*(-?)\}\}", text, re.S):
        before = text[at:match.start()]
        parts.append(("text", before.rstrip() if match[1] else before))
        parts.append(("do", match[2]))
        at = match.end()
        if match[3]:
            at += len(text[at:]) - len(text[at:].lstrip())
    return parts + [("text", text[at:])]


def parse(parts, end=("eof",)):
    """Nested nodes up to one of `end`; returns them and the action that ended them."""
    nodes = []
    while parts:
        kind, value = parts.pop(0)
        word = value.split(" ")[0] if kind == "do" else ""
        if kind == "text":
            nodes.append(("text", value))
        elif word in end:
            return nodes, value
        elif word in ("if", "with", "range", "define"):
            body, last = parse(parts, ("end", "else"))
            otherwise = []
            if last == "else":
                otherwise, last = parse(parts, ("end",))
            if last != "end":
                raise SystemExit(f"render_chart.py: {{{{ {last} }}}} is not known here")
            nodes.append((word, value[len(word):].strip(), body, otherwise))
        else:
            nodes.append(("do", value))
    if "eof" not in end:
        raise SystemExit(f"render_chart.py: an {end[0]} is missing")
    return nodes, "eof"


class Chart:
    def __init__(self, folder, values, release="es"):
        info = yaml.safe_load((folder / "Chart.yaml").read_text())
        self.root = {"Values": values, "Release": {"Name": release, "Namespace": "default", "Service": "Helm"},
                     "Chart": {"Name": info["name"], "AppVersion": info["appVersion"]},
                     "Template": {"BasePath": "templates"}}
        self.named = {}
        self.files = {}
        for path in sorted((folder / "templates").iterdir()):
            if path.suffix in (".yaml", ".tpl"):
                nodes, _ = parse(split(path.read_text()))
                self.files[path.name] = nodes
                self.named[f"templates/{path.name}"] = nodes
                self.named.update({json.loads(n[1]): n[2] for n in nodes if n[0] == "define"})

    def render(self):
        for name, nodes in self.files.items():
            if name.endswith(".yaml"):
                text = self.run(nodes, self.root, {"$": self.root})
                if text.strip():
                    yield name, text

    def run(self, nodes, dot, names):
        out = []
        for node in nodes:
            if node[0] == "text":
                out.append(node[1])
            elif node[0] == "do":
                value = self.value(node[1], dot, names)
                out.append("" if value is None else "true" if value is True
                           else "false" if value is False else str(value))
            elif node[0] == "if":
                out.append(self.run(node[2 if self.value(node[1], dot, names) else 3], dot, names))
            elif node[0] == "with":
                value = self.value(node[1], dot, names)
                out.append(self.run(node[2 if value else 3], value if value else dot, names))
            elif node[0] == "range":
                left, right = node[1].split(":=")
                key, item = (name.strip() for name in left.split(","))
                for k, v in sorted(self.value(right, dot, names).items()):
                    out.append(self.run(node[2], v, {**names, key: k, item: v}))
        return "".join(out)

    def value(self, text, dot, names):
        tokens = TOKEN.findall(text)
        value = self.pipeline(tokens, dot, names)
        if tokens:
            raise SystemExit(f"render_chart.py: {{{{ {text} }}}} is not understood")
        return value

    def pipeline(self, tokens, dot, names):
        value = self.command(tokens, dot, names, [])
        while tokens and tokens[0] == "|":
            tokens.pop(0)
            value = self.command(tokens, dot, names, [value])
        return value

    def command(self, tokens, dot, names, piped):
        words = []
        while tokens and tokens[0] not in ("|", ")"):
            token = tokens.pop(0)
            if token == "(":
                words.append(self.pipeline(tokens, dot, names))
                tokens.pop(0)
            elif token[0] in "\"0123456789":
                words.append(json.loads(token))
            elif token[0] in ".$":
                words.append(self.field(token, dot, names))
            else:
                words.append(getattr(self, "do_" + token))  # unknown: AttributeError names it
        if callable(words[0]):
            return words[0](*words[1:], *piped)
        return words[0]

    @staticmethod
    def field(token, dot, names):
        first, *rest = token.split(".")
        value = names[first] if first else dot
        for name in filter(None, rest):
            value = value[name]  # a value that values.yaml lacks is a KeyError
        return value

    def do_include(self, name, dot):
        return self.run(self.named[name], dot, {"$": self.root})

    do_quote = staticmethod(lambda v: json.dumps(v if isinstance(v, str) else yaml.safe_dump(v).split("\n")[0]))
    do_nindent = staticmethod(lambda n, v: "\n" + "\n".join(" " * n + line for line in v.split("\n")))
    do_toYaml = staticmethod(lambda v: yaml.safe_dump(v, sort_keys=True).rstrip("\n"))
    do_not = staticmethod(lambda v: not v)
    do_eq = staticmethod(lambda a, b: a == b)
    do_add = staticmethod(lambda *v: sum(v))
    do_div = staticmethod(lambda a, b: a // b)
    do_default = staticmethod(lambda other, v: v or other)
    do_trunc = staticmethod(lambda n, v: v[:n])
    do_trimSuffix = staticmethod(lambda end, v: v.removesuffix(end))
    do_int64 = staticmethod(int)
    do_print = staticmethod(lambda *v: "".join(map(str, v)))
    do_sha256sum = staticmethod(lambda v: hashlib.sha256(v.encode()).hexdigest())


def merge(base, over):
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            merge(base[key], value)
        else:
            base[key] = value


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("chart", type=pathlib.Path)
    parser.add_argument("-f", action="append", default=[], type=pathlib.Path)
    parser.add_argument("--set", action="append", default=[])
    options = parser.parse_args()
    values = yaml.safe_load((options.chart / "values.yaml").read_text())
    for path in options.f:
        merge(values, yaml.safe_load(path.read_text()))
    for setting in options.set:
        path, _, value = setting.partition("=")
        over = yaml.safe_load(value) if value else ""
        for name in reversed(path.split(".")):
            over = {name: over}
        merge(values, over)
    import jsonschema  # comes with kubernetes-validate

    try:
        jsonschema.validate(values, json.loads((options.chart / "values.schema.json").read_text()))
    except jsonschema.ValidationError as error:
        sys.exit(f"values: {error.message}")
    for name, text in Chart(options.chart, values).render():
        print(f"---\n# {name}\n{text}")


if __name__ == "__main__":
    main()
