"""The report's style sheet: one column that holds from a telephone to a wide screen, light and dark."""

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #fbfaf8; --card: #ffffff; --ink: #1d1c1a; --muted: #67635c; --line: #e4e1da; --soft: #f1efea;
  --accent: #14746f; --accent-soft: #14746f2e; --right: #14746f; --wrong: #b93c0c; --tile: #ffffff;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #161615; --card: #1f1e1c; --ink: #eceae5; --muted: #a29d94; --line: #35332f; --soft: #292825;
    --accent: #58b8ae; --accent-soft: #58b8ae38; --right: #58b8ae; --wrong: #f0895a; --tile: #f4f2ed;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--paper); color: var(--ink); -webkit-text-size-adjust: 100%;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif;
  font-variant-numeric: tabular-nums;
}
.page { max-width: 1120px; margin: 0 auto; padding: 48px 28px 72px; }
h1, h2, h3, h4, p, figure, dl, dd, ul, ol { margin: 0; }
h1 { font-size: clamp(30px, 5vw, 46px); line-height: 1.1; letter-spacing: -0.02em; font-weight: 700;
  overflow-wrap: anywhere; }
h2 { font-size: 24px; letter-spacing: -0.01em; line-height: 1.25; margin: 64px 0 6px; }
h3 { font-size: 17px; line-height: 1.35; margin: 28px 0 10px; }
h4 { font-size: 14px; font-weight: 600; color: var(--muted); margin: 20px 0 10px; }
a { color: var(--accent); }
.lead { color: var(--muted); max-width: 70ch; margin-bottom: 18px; }
.eyebrow { color: var(--accent); font-weight: 600; font-size: 14px; margin-bottom: 8px; }
.facts { display: flex; flex-wrap: wrap; gap: 10px 32px; margin-top: 22px; }
.facts dt { color: var(--muted); font-size: 13px; }
.facts dd { font-weight: 550; overflow-wrap: anywhere; }
nav { display: flex; flex-wrap: wrap; gap: 4px 20px; margin-top: 28px; padding: 12px 0; font-size: 15px;
  border-block: 1px solid var(--line); }
nav a { text-decoration: none; }
nav a:hover { text-decoration: underline; }

.scores { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 320px), 1fr)); gap: 18px; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 20px 22px; min-width: 0; }
.card h3 { margin-top: 0; }
.card .about { color: var(--muted); font-size: 14px; margin-bottom: 14px; }
.measure { display: grid; grid-template-columns: auto 1fr; align-items: baseline; column-gap: 10px; margin-top: 12px; }
.measure b { font-size: 24px; letter-spacing: -0.01em; line-height: 1.1; }
.measure.first b { font-size: 44px; letter-spacing: -0.03em; }
.measure span { color: var(--muted); }
.meter { position: relative; grid-column: 1 / -1; height: 10px; margin-top: 8px; border-radius: 5px;
  background: var(--soft); }
.meter i { position: absolute; top: 0; bottom: 0; }
.meter .fill { left: 0; border-radius: 5px; background: var(--accent); min-width: 3px; }
.meter .chance { width: 2px; top: -3px; bottom: -3px; background: var(--wrong); }
.measure small { grid-column: 1 / -1; color: var(--muted); font-size: 13px; margin-top: 5px; }
.tiles { display: flex; flex-wrap: wrap; gap: 1px; margin-top: 18px;
  background: var(--line); border: 1px solid var(--line); border-radius: 12px; overflow: hidden; }
.tiles div { flex: 1 1 150px; background: var(--card); padding: 14px 18px; }
.tiles b { display: block; font-size: 22px; letter-spacing: -0.01em; line-height: 1.3; }
.tiles span { color: var(--muted); font-size: 14px; }

.charts { display: grid; grid-template-columns: repeat(6, 1fr); gap: 18px; margin-top: 18px; }
.chart { grid-column: span 3; }
.chart:first-child { grid-column: 1 / -1; }
.chart figcaption { display: flex; justify-content: space-between; gap: 12px; font-weight: 600; }
.chart figcaption span { font-weight: 400; color: var(--muted); }
.plot { position: relative; height: 150px; margin: 14px 6px 24px 44px; border-left: 1px solid var(--line);
  border-bottom: 1px solid var(--line); }
.chart:first-child .plot { height: 250px; }
.plot svg { position: absolute; inset: 0; width: 100%; height: 100%; display: block; overflow: visible; }
.plot path { fill: none; vector-effect: non-scaling-stroke; stroke-linejoin: round; }
.plot .grid { stroke: var(--line); stroke-width: 1; }
.plot .raw { stroke: var(--accent); stroke-opacity: 0.28; stroke-width: 1; }
.plot .main { stroke: var(--accent); stroke-width: 2; }
.plot em { position: absolute; font-style: normal; font-size: 12px; line-height: 1; color: var(--muted);
  white-space: nowrap; }
.plot .y { right: 100%; transform: translate(-7px, -50%); }
.plot .x { top: 100%; transform: translate(-50%, 7px); }
.chart .axis { text-align: right; color: var(--muted); font-size: 12px; line-height: 1; }

.sheet { display: grid; grid-template-columns: repeat(auto-fill, minmax(118px, 1fr)); gap: 12px; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 10px; overflow: hidden; min-width: 0; }
.picture { display: grid; place-items: center; background: var(--tile); aspect-ratio: 1; padding: 10px; }
.picture img { width: 100%; height: 100%; object-fit: contain; }
.tile .caption { padding: 8px 10px 10px; font-size: 13px; line-height: 1.35; overflow-wrap: anywhere; }
.right { color: var(--right); } .wrong { color: var(--wrong); }
.caption b { font-weight: 600; }
.caption span { color: var(--muted); display: block; }

.queries { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 460px), 1fr)); gap: 12px; }
.query { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 12px 14px;
  min-width: 0; }
.query > p { font-weight: 550; margin-bottom: 8px; overflow-wrap: anywhere; }
.row { display: grid; grid-template-columns: repeat(5, 1fr); gap: 8px; }
.hit { min-width: 0; font-size: 12px; color: var(--muted); text-align: center; line-height: 1.5; }
.hit .picture { border-radius: 8px; padding: 6px; border: 2px solid var(--line); margin-bottom: 2px; }
.hit.yes .picture { border-color: var(--right); }
.pair { display: grid; grid-template-columns: 96px 1fr; gap: 16px; align-items: center; }
.pair .picture { border-radius: 8px; border: 1px solid var(--line); }
.pair ol { list-style: none; padding: 0; font-size: 14px; min-width: 0; }
.pair li { display: flex; gap: 8px; justify-content: space-between; color: var(--muted); }
.pair li span { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; min-width: 0; }
.pair li.yes { color: var(--right); font-weight: 600; }

.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 10px; background: var(--card);
  margin-top: 10px; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th, td { padding: 8px 14px; text-align: left; vertical-align: top; border-top: 1px solid var(--line); }
thead th { border-top: 0; color: var(--muted); font-weight: 500; white-space: nowrap; }
tbody th { font-weight: 550; min-width: 130px; }
tbody:first-child tr:first-child > * { border-top: 0; }
.number { text-align: right; white-space: nowrap; }
.tight { white-space: nowrap; }
.bar { position: relative; min-width: 170px; white-space: nowrap; }
.bar i { position: absolute; left: 72px; right: 14px; top: 15px; height: 8px; border-radius: 4px;
  background: var(--soft); overflow: hidden; }
.bar i::before { content: ""; display: block; height: 100%; width: var(--share); background: var(--accent); }
details { margin-top: 10px; border: 1px solid var(--line); border-radius: 10px; background: var(--card); }
summary { cursor: pointer; padding: 10px 16px; font-weight: 550; }
summary:focus-visible, a:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
details .scroll { border-width: 1px 0 0; border-radius: 0 0 10px 10px; margin: 0; }
pre { margin: 0; padding: 14px 18px; border-top: 1px solid var(--line); overflow-x: auto; font-size: 13px;
  line-height: 1.5; font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
footer { margin-top: 64px; padding-top: 16px; border-top: 1px solid var(--line); color: var(--muted); font-size: 14px; }
@media (max-width: 720px) {
  .page { padding: 28px 16px 48px; }
  .chart { grid-column: 1 / -1; }
  .chart:first-child .plot { height: 200px; }
  h2 { margin-top: 48px; }
  .card { padding: 16px 18px; }
  .sheet { grid-template-columns: repeat(auto-fill, minmax(96px, 1fr)); gap: 8px; }
  .facts { display: grid; grid-template-columns: 1fr 1fr; gap: 10px 20px; }
}
@media print { nav { display: none; } .card, .tile, .query { break-inside: avoid; } }
"""
