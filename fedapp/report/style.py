"""The look of report.html, light and dark; text in Python, since app bundles carry no .css files."""

CSS = """
:root{color-scheme:light dark;--page:#f6f7f9;--card:#fff;--ink:#1b1f27;--soft:#626b7a;--edge:#e3e6eb;
--grid:#e9ebef;--s0:#3566d6;--s1:#d9730d;--alert:#fff4dc;--hover:#0002}
@media(prefers-color-scheme:dark){:root{--page:#111419;--card:#1a1e25;--ink:#e8ebf0;--soft:#97a1b1;--edge:#2a303a;
--grid:#2a303a;--s0:#7ba4ff;--s1:#ffa857;--alert:#3a3018;--hover:#fff3}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:15px/1.5 system-ui,sans-serif;
overflow-wrap:anywhere}
main{max-width:1240px;margin:auto;padding:32px 20px 48px;display:grid;gap:16px}
main>*{min-width:0}
h1{margin:0;font-size:28px;line-height:1.2;letter-spacing:-.02em}
h2,h3{margin:0;font-size:13px;font-weight:600}
h2,.choices,.unit,.axis,.note,.ends,small,th{color:var(--soft)}
.choices{margin:6px 0 0;display:flex;flex-wrap:wrap;gap:2px 20px}
.choices strong{color:var(--ink);font-weight:600}
.card{background:var(--card);border:1px solid var(--edge);border-radius:10px;padding:16px 18px;margin:0;
min-width:0}
.alert{margin:0;padding:10px 18px;border-radius:10px;background:var(--alert)}
.empty{color:var(--soft);text-align:center;padding:40px}
.tiles{display:flex;flex-wrap:wrap;gap:16px}
.tile{flex:1 1 150px}
.tile p{margin:2px 0;font-size:27px;line-height:1.25;font-weight:650;letter-spacing:-.02em}
.tile small{font-size:12.5px;line-height:1.35;display:block}
.charts{display:grid;gap:16px;grid-template-columns:repeat(6,1fr)}
.charts>*{grid-column:span 2}
.of2>*,.of4>*{grid-column:span 3}
.of1>*,.charts>.wide{grid-column:1/-1}
.tables{display:grid;gap:16px;grid-template-columns:repeat(4,1fr)}
figcaption{display:flex;flex-wrap:wrap;justify-content:space-between;gap:2px 16px}
.legend{display:flex;flex-wrap:wrap;gap:2px 14px;font-size:13px;color:var(--soft)}
.legend strong{color:var(--ink);font-weight:600}
.legend b{display:inline-block;width:10px;height:10px;border-radius:3px;margin-right:5px}
.unit,.axis,.ends{font-size:12px}
.unit{margin:10px 0 8px}
.axis{text-align:center;margin:26px 0 0 48px}
.plot{position:relative;height:200px;margin:0 12px 0 48px}
.plot svg{width:100%;height:100%;display:block;overflow:visible}
.plot i{position:absolute;font:12px/1 system-ui,sans-serif;color:var(--soft);white-space:nowrap;
font-variant-numeric:tabular-nums}
.plot .y{right:100%;margin:-6px 10px 0 0}
.plot .x{top:100%;transform:translateX(-50%);margin-top:10px}
path,.grid{vector-effect:non-scaling-stroke;fill:none}
.grid{stroke:var(--grid)}
.line{stroke:currentColor;stroke-width:2;stroke-linejoin:round}
.dot{stroke:currentColor;stroke-width:0;stroke-linecap:round}
.dotted .dot,g:last-of-type>.dot{stroke-width:6}
.hit{stroke:transparent;stroke-width:12}
.area{fill:transparent}.area:hover{fill:var(--hover)}
g:hover>.dot{stroke-width:10}
.s0{color:var(--s0)}.s1{color:var(--s1)}
b.s0{background:var(--s0)}b.s1{background:var(--s1)}
.ends{display:flex;justify-content:space-between;margin:10px 0 4px}
.bars{display:grid;gap:3px}
.row{display:grid;grid-template-columns:40px 1fr 48px;gap:8px;align-items:center;
font-size:12px;line-height:16px}
.row i{font-style:normal;color:var(--soft);font-variant-numeric:tabular-nums}
.row i:last-child{text-align:right}
.bar{display:flex;height:14px;border-radius:3px;overflow:hidden}
.note{font-size:12.5px;margin:10px 0 0}
.c0{background:#4269d0;fill:#4269d0}.c1{background:#efb118;fill:#efb118}.c2{background:#ff725c;fill:#ff725c}
.c3{background:#6cc5b0;fill:#6cc5b0}.c4{background:#3ca951;fill:#3ca951}
.c5{background:#ff8ab7;fill:#ff8ab7}.c6{background:#a463f2;fill:#a463f2}.c7{background:#97bbf5;fill:#97bbf5}
.c8{background:#9c6b4e;fill:#9c6b4e}.c9{background:#9498a0;fill:#9498a0}
table{width:100%;border-collapse:collapse;font-size:13px;margin-top:8px}
th,td{padding:4px 0;font-weight:400;text-align:left;vertical-align:top;border-top:1px solid var(--grid)}
td{text-align:right;padding-left:12px;font-variant-numeric:tabular-nums}
tr:first-child>*{border-top:0}
.attack{overflow-x:auto}
.attack td{padding:6px 3px;text-align:center;font-size:12px;color:var(--soft);border:0}
.attack th{min-width:150px;border:0;color:var(--ink)}
.attack img{width:100%;min-width:44px;display:inline-block;border:1px solid var(--edge)}
details summary{cursor:pointer;font-size:13px;font-weight:600}
pre{margin:12px 0 0;font:12.5px/1.5 ui-monospace,Menlo,Consolas,monospace;white-space:pre-wrap}
@media(max-width:1000px){.tables{grid-template-columns:repeat(2,minmax(0,1fr))}.charts>*{grid-column:1/-1!important}}
@media(max-width:620px){main{padding:20px 12px 32px;gap:12px}.tiles,.charts,.tables{gap:12px}
.tables{grid-template-columns:1fr}
.tile p{font-size:23px}.card{padding:14px}}
"""
