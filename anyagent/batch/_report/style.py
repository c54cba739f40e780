"""The style sheet of the report, and the policy under which nothing but it is applied."""

from __future__ import annotations

import base64
import hashlib
from typing import Final

from .svg import DARK

__all__ = ["POLICY", "STYLE"]

STYLE: Final = f"""
:root {{
  color-scheme: light dark;
  --page: #f6f8fa; --card: #ffffff; --text: #1f2328; --soft: #57606a; --edge: #d0d7de;
}}
body {{
  margin: 0; background: var(--page); color: var(--text); line-height: 1.45;
  font-family: system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif;
}}
main {{ max-width: 1120px; margin: 0 auto; padding: 24px 16px 48px; }}
h1 {{ font-size: 1.6rem; margin: 0; }}
h2 {{ font-size: 1.15rem; margin: 32px 0 12px; }}
h3 {{ font-size: .95rem; margin: 0 0 8px; }}
p {{ margin: 4px 0; }}
.soft, thead th, dt, small {{ color: var(--soft); }}
.card {{
  background: var(--card); border: 1px solid var(--edge); border-radius: 8px; padding: 12px 14px;
  min-width: 0; break-inside: avoid;
}}
.tiles {{ display: grid; gap: 12px; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); }}
.tiles {{ margin: 20px 0 0; }}
dt {{ font-size: .85rem; }}
dd {{ margin: 0; font-size: 1.4rem; font-weight: 600; font-variant-numeric: tabular-nums; }}
small {{ display: block; font-size: .8rem; font-weight: 400; }}
.plots {{ display: grid; gap: 16px; align-items: start; }}
.plots {{ grid-template-columns: repeat(auto-fit, minmax(min(100%, 430px), 1fr)); }}
.plots svg {{ display: block; width: 100%; height: auto; }}
.plots + .scroll, .plots + p {{ margin-top: 16px; }}
.scroll {{ overflow-x: auto; width: fit-content; max-width: 100%; box-sizing: border-box; }}
table {{ border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }}
th, td {{
  padding: 5px 0 5px 20px; text-align: right; font-weight: 400; border-bottom: 1px solid var(--edge);
  white-space: nowrap;
}}
.words td, .words th {{ text-align: left; }}
.words td, tbody th {{ white-space: normal; overflow-wrap: anywhere; min-width: 7em; }}
th:first-child {{ padding-left: 0; text-align: left; }}
tbody tr:last-child > * {{ border-bottom: 0; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --page: #0d1117; --card: #161b22; --text: #e6edf3; --soft: #9aa4af; --edge: #30363d; }}
  {DARK}
}}
@media print {{
  body {{ background: none; }}
  main {{ max-width: none; padding: 0; }}
  .plots {{ grid-template-columns: 1fr 1fr; }}
  h2 {{ break-after: avoid; }}
}}
"""

_DIGEST: Final = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
POLICY: Final = f"default-src 'none'; base-uri 'none'; form-action 'none'; style-src 'sha256-{_DIGEST}'"
