"""Mend the README's links to lines of code, and its counts of lines.

    python .ci/links.py              write the numbers that the files have now
    python .ci/links.py --check      change nothing; exit 1 with the list of what is stale

A link is [`name`](file.py#L12): a function, a class, `Class.method`, or a value assigned at the top of the file or
of a class. A count is [file.py](file.py) (605 lines ...).
"""
import ast
import functools
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
LINK = re.compile(r"\[`?([^\]`]*)`?\]\(([\w./]+\.py)#L(\d+)\)")
COUNT = re.compile(r"\]\(([\w./]+\.py)\) \(([\d,]+) lines")


def definitions(body, prefix=""):
    """(name, line) of everything that the statements define, and of the members of their classes."""
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield prefix + node.name, node.lineno
        if isinstance(node, ast.ClassDef):
            yield from definitions(node.body, f"{prefix}{node.name}.")
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            for name in ast.walk(node):
                if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store):
                    yield prefix + name.id, node.lineno


@functools.cache
def read(file):
    """A file's names with their lines, and its number of lines; {} and None where there is no such file."""
    if not (ROOT / file).exists():
        return {}, None
    code = (ROOT / file).read_text(encoding="utf-8")
    return dict(definitions(ast.parse(code).body)), len(code.splitlines())


def mend(text):
    """The text with the right numbers, one line for each that was stale, and the names that do not exist."""
    stale, missing = [], []
    for match in {match[0]: match for match in LINK.finditer(text)}.values():
        name, file, line = match[1], match[2], read(match[2])[0].get(match[1])
        if line is None:
            missing.append(f"{name} in {file}")
        elif line != int(match[3]):
            stale.append(f"{name} is at {file}#L{line}, not #L{match[3]}")
            text = text.replace(match[0], match[0].replace(f"#L{match[3]})", f"#L{line})"))
    for match in {match[0]: match for match in COUNT.finditer(text)}.values():
        file, lines = match[1], read(match[1])[1]
        if lines is None:
            missing.append(file)
        elif f"{lines:,}" != match[2]:
            stale.append(f"{file} has {lines:,} lines, not {match[2]}")
            text = text.replace(match[0], f"]({file}) ({lines:,} lines")
    return text, stale, missing


def main():
    if sys.argv[1:] not in ([], ["--check"]):
        sys.exit("usage: python .ci/links.py [--check]")
    readme = ROOT / "README.md"
    text, stale, missing = mend(readme.read_text(encoding="utf-8"))
    if stale:
        print("\n".join(stale))
    if stale and not sys.argv[1:]:
        readme.write_text(text, encoding="utf-8")
    if missing:
        sys.exit(f"README.md links to what does not exist: {', '.join(missing)}")
    if stale and sys.argv[1:]:
        sys.exit(f"README.md: {len(stale)} stale, mended by: python .ci/links.py")


if __name__ == "__main__":
    main()
