"""The style sheet of pages: light and dark, wide and on a phone, and printed."""

# The series are Okabe and Ito's blue and vermillion on a light ground, their sky blue and orange on a dark one.
# `.scroll`: a shade at a side says that the table goes on there; at its end a cover of the ground's colour, which
# scrolls along, hides the shade.
STYLE = """\
:root {
  color-scheme: light;
  --ground: #ffffff; --raised: #f4f6f8; --ink: #1c2127; --soft: #57606a; --line: #d5dbe1; --link: #0a5a9c;
  --shade: rgb(20 30 40 / 0.28); --series-1: #0072b2; --series-2: #d55e00;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    color-scheme: dark;
    --ground: #15181c; --raised: #1e2328; --ink: #e6e9ec; --soft: #a5aeb7; --line: #39414a; --link: #7cbcf0;
    --shade: rgb(190 205 220 / 0.3); --series-1: #56b4e9; --series-2: #e69f00;
  }
}
*, ::before, ::after { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body {
  max-width: 84rem; margin: 0 auto; padding: 1.5rem max(1rem, 3vw) 3rem;
  background: var(--ground); color: var(--ink); overflow-wrap: break-word;
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Liberation Sans", Arial, sans-serif;
}
h1 { margin: 0 0 0.4rem; font-size: 1rem; font-weight: 600; color: var(--soft); overflow-wrap: anywhere; }
.verdict {
  margin: 0; font-size: clamp(1.2rem, 1rem + 0.9vw, 1.6rem); line-height: 1.3; font-weight: 600; text-wrap: pretty;
}
.sentence + .verdict, .verdict + .verdict { margin-top: 1.4rem; }
.numbers { display: flex; flex-wrap: wrap; gap: 0.6rem 2.2rem; margin: 0.8rem 0 0; }
.numbers > div { padding: 0; border: 0; }
.numbers dd { font-size: 1.15rem; font-weight: 600; }
.sentence { max-width: 62rem; margin: 0.8rem 0 0; color: var(--soft); }
a { color: var(--link); }
nav {
  display: flex; flex-wrap: wrap; gap: 0.25rem 1.2rem; margin-top: 1.4rem; padding: 0.6rem 0;
  border-block: 1px solid var(--line); font-size: 0.925rem;
}
nav a { padding: 0.15rem 0; text-underline-offset: 0.2em; text-decoration-thickness: 1px; }
section { margin-top: 2.4rem; }
h2 { margin: 0 0 0.5rem; font-size: 1.25rem; line-height: 1.3; }
section > p { max-width: 46rem; margin: 0.5rem 0; }
figure { margin: 0; min-width: 0; }
figcaption, .note { font-size: 0.9rem; line-height: 1.45; color: var(--soft); overflow-wrap: anywhere; }
.pictures {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)); gap: 1.8rem 1.5rem;
  margin-top: 1rem; align-items: start;
}
.pictures figcaption { margin-top: 0.4rem; }
svg { display: block; max-width: 100%; height: auto; fill: currentColor; overflow: visible; }
svg text:not(:has(tspan)) { font-family: inherit !important; }
.image { overflow-x: auto; }
.image img { display: block; max-width: 100%; height: auto; background: #fff; }
.forms { margin: 0.3rem 0 0; font-size: 0.9rem; color: var(--soft); }
.table { margin-top: 1.4rem; }
.table figcaption { margin-bottom: 0.35rem; color: var(--ink); font-weight: 600; }
.note { margin: 0.4rem 0 0; max-width: 46rem; }
.scroll {
  overflow-x: auto; width: fit-content; max-width: 100%;
  background:
    linear-gradient(to right, var(--ground) 40%, transparent) left / 2.4rem 100% no-repeat local,
    linear-gradient(to left, var(--ground) 40%, transparent) right / 2.4rem 100% no-repeat local,
    linear-gradient(to right, var(--shade), transparent) left / 0.9rem 100% no-repeat scroll,
    linear-gradient(to left, var(--shade), transparent) right / 0.9rem 100% no-repeat scroll;
}
table { border-collapse: collapse; font-size: 0.925rem; line-height: 1.4; font-variant-numeric: tabular-nums; }
th, td { padding: 0.4rem 0.8rem; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
thead th { vertical-align: bottom; font-weight: 600; border-bottom: 2px solid var(--line); }
td { max-width: 26rem; }
.number { text-align: right; }
tbody .short { white-space: nowrap; }
.long { min-width: 8.5rem; overflow-wrap: anywhere; }
tr > :first-child {
  position: sticky; left: 0; padding-left: 0; max-width: 18rem; background: var(--ground);
}
tbody th { font-weight: 400; }
tbody th:not(.short, .number) { min-width: 8.5rem; }
dl {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 15rem), 1fr)); gap: 0.9rem 1.5rem;
  margin: 1.2rem 0 0;
}
dl > div { min-width: 0; padding-top: 0.45rem; border-top: 1px solid var(--line); }
dt { font-size: 0.9rem; color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
footer { margin-top: 3rem; padding-top: 1rem; border-top: 1px solid var(--line); }
summary { cursor: pointer; color: var(--link); width: fit-content; }
.data { margin-top: 0.6rem; padding: 0.8rem; max-height: 24rem; overflow: auto; background: var(--raised); }
.data script { display: block; white-space: pre-wrap; overflow-wrap: anywhere; }
pre { padding: 0.8rem; overflow-x: auto; background: var(--raised); }
pre, .data script, .made { font: 0.875rem/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "Liberation Mono", monospace; }
.made { margin: 1rem 0 0; color: var(--soft); white-space: pre-wrap; overflow-wrap: anywhere; }
:focus-visible { outline: 2px solid var(--link); outline-offset: 2px; }
@media (max-width: 40rem) {
  body { padding-top: 1rem; }
  th, td { padding-inline: 0.55rem; }
  tr > :first-child { max-width: 9.5rem; border-right: 1px solid var(--line); }
  .numbers { gap: 0.5rem 1.4rem; }
  .stacked .scroll { width: auto; background: none; }
  .stacked thead { display: none; }
  .stacked table, .stacked tbody { display: block; }
  .stacked tr {
    display: grid; grid-template-columns: 2fr 3fr 2fr; gap: 0.2rem 0.6rem; padding: 0.6rem 0;
    border-bottom: 1px solid var(--line);
  }
  .stacked th, .stacked td {
    min-width: 0; max-width: none; padding: 0; border: 0; text-align: left; white-space: normal !important;
  }
  .stacked tr > :first-child { position: static; max-width: none; border: 0; font-weight: 600; }
  .stacked tr > :first-child, .stacked td[data-head=""] { grid-column: 1 / -1; order: -2; }
  .stacked td[data-head="difference"], .stacked td[data-head="interval"], .stacked td[data-head="shown"] { order: -1; }
  .stacked td::before { content: attr(data-head); display: block; font-size: 0.875rem; color: var(--soft); }
  .stacked td:empty { visibility: hidden; }
}
@media print {
  html { font-size: 9.5pt; }
  body { max-width: none; padding: 0; }
  table { font-size: 0.8rem; }
  th, td { padding: 0.25rem 0.4rem; }
  .long { min-width: 5rem; }
  nav, details { display: none; }
  .scroll { overflow: visible; background: none; }
  tr > :first-child { position: static; }
  figure, tr, dl > div { break-inside: avoid; }
  h2 { break-after: avoid; }
}
svg [style*="stroke: #000000"] { stroke: currentColor !important; }
"""
