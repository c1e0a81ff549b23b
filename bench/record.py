"""The JSON that keeps a run: environment, command, commit, and every sample. schema.json says what
is in it; whatever is shown is made from it alone."""

from __future__ import annotations

import json
import re
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from dcpo_kernels.bench import machine

SCHEMA = json.loads((Path(__file__).parent / "schema.json").read_text())
VERSION = 1
_TYPES = {
    "object": dict,
    "array": list,
    "string": str,
    "boolean": bool,
    "integer": int,
    "number": (int, float),
    "null": type(None),
}


class BadRecord(Exception):
    """A file that is no record, by name and field."""


def new(cache: str, gpu: dict[str, Any] | None, skipped: list[str]) -> dict[str, Any]:
    return {
        "schema": VERSION,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": shlex.join(["dcpo", *sys.argv[1:]]),
        "environment": machine.environment(gpu),
        "cache": cache,
        "skipped": skipped,
        "complete": False,
        "rows": [],
    }


def save(record: dict[str, Any], path: Path) -> None:
    """All of it or nothing: a second Ctrl-C must not leave half a file."""
    text = json.dumps(record, indent=1)
    # Thousands of samples, one a line, would bury the rest.
    text = re.sub(r"\[[-+\d.e,\s]+\]", lambda m: re.sub(r"\s+", " ", m[0]), text)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text + "\n")
    part.replace(path)


def load(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text())
    except OSError as error:
        raise BadRecord(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise BadRecord(f"{path} is not JSON: {error}") from None
    problem = mismatch(record, SCHEMA)
    if problem:
        raise BadRecord(f"{path} is no record of dcpo bench: {problem}")
    return record


def mismatch(value: Any, schema: dict[str, Any], at: str = "record") -> str:
    """The first thing in which a value differs from a JSON schema, "" if nothing does. Knows the
    keywords that schema.json uses."""
    if "$ref" in schema:
        schema = SCHEMA["$defs"][schema["$ref"].rsplit("/", 1)[1]]
    types = schema.get("type", [])
    types = [types] if isinstance(types, str) else types
    if types and not any(_is(value, name) for name in types):
        return f"{at} must be {' or '.join(types)}, is {json.dumps(value)[:60]}"
    if "enum" in schema and value not in schema["enum"]:
        return f"{at} must be one of {schema['enum']}, is {json.dumps(value)[:60]}"
    if "minimum" in schema and _is(value, "number") and value < schema["minimum"]:
        return f"{at} must be at least {schema['minimum']}, is {value}"
    if isinstance(value, dict):
        known = schema.get("properties", {})
        for name in schema.get("required", []):
            if name not in value:
                return f"{at}.{name} is missing"
        for name, item in value.items():
            if name in known:
                problem = mismatch(item, known[name], f"{at}.{name}")
            elif schema.get("additionalProperties") is False:
                problem = f"{at}.{name} is not known"
            else:
                problem = ""
            if problem:
                return problem
    if isinstance(value, list) and "items" in schema:
        for i, item in enumerate(value):
            problem = mismatch(item, schema["items"], f"{at}[{i}]")
            if problem:
                return problem
    return ""


def _is(value: Any, name: str) -> bool:
    if isinstance(value, bool):
        return name == "boolean"
    return isinstance(value, _TYPES[name])
