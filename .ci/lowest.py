"""Print pip constraints that pin what the package needs at run time to the lowest versions it declares."""

import re
import tomllib

with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)["project"]
extras = project["optional-dependencies"]
requirements = list(project["dependencies"])
for extra in ("cli", "uvloop", "otel", "parquet", "ray"):
    requirements += extras[extra]
for requirement in requirements:
    match = re.match(r"([\w.-]+)(?:\[[\w,]+\])?>=([\w.]+)", requirement)
    if match is None:
        raise SystemExit(f"no lower bound in {requirement!r}")
    print(f"{match[1]}=={match[2]}")
