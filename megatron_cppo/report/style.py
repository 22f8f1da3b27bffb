"""The report's style sheet and the few lines of script behind its hovering. Owns colours and spacing, no content."""

STYLE = """
:root{color-scheme:light dark;--page:#f6f6f3;--card:#fff;--ink:#14140f;--soft:#55544d;--faint:#8b8a82;
--grid:#ecebe6;--base:#c9c8c1;--edge:#e4e3dc;--good:#0a7a2f;--bad:#c02f2e;--outline:#14140f;
--c1:#2a78d6;--c2:#eb6834;--c3:#1baf7a;--c4:#eda100;--c5:#4a3aa7;--c6:#e87ba4;--c7:#008300;--c8:#8b8a82}
@media (prefers-color-scheme:dark){:root{--page:#0f0f0e;--card:#1a1a18;--ink:#f4f4ef;--soft:#bdbcb3;--faint:#8b8a82;
--grid:#2a2a27;--base:#45443f;--edge:#2c2c29;--good:#4cc26d;--bad:#f07a79;--outline:#f4f4ef;
--c1:#3987e5;--c2:#d95926;--c3:#199e70;--c4:#c98500;--c5:#9085e9;--c6:#d55181;--c7:#2f9a2f;--c8:#8b8a82}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:1180px;margin:0 auto;padding:36px 20px 64px}
h1{font-size:30px;line-height:1.2;margin:0;letter-spacing:-.01em;overflow-wrap:anywhere}
h2{font-size:20px;margin:44px 0 4px;letter-spacing:-.005em}
section>p,.top p{margin:0 0 6px;color:var(--soft)}
.notes{max-width:72ch;margin:18px 0 0}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(190px,1fr));gap:12px;margin-top:22px}
.tile,.card,.sample{background:var(--card);border:1px solid var(--edge);border-radius:10px}
.tile{padding:14px 16px;display:flex;flex-direction:column}
.tile span{color:var(--soft);font-size:13px}
.tile strong{font-size:27px;font-weight:600;line-height:1.35;letter-spacing:-.01em;white-space:nowrap}
.tile strong small{font-size:16px;font-weight:400;color:var(--faint);letter-spacing:0}
.tile em{font-style:normal;font-size:13px;color:var(--faint)}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(330px,100%),1fr));gap:12px;margin-top:12px}
.card{margin:0;padding:14px 14px 12px;display:flex;flex-direction:column;min-width:0}
.card h3{display:flex;justify-content:space-between;margin:0 2px 6px;font-size:15px;font-weight:600}
.card h3 b{font-weight:500;color:var(--soft);font-variant-numeric:tabular-nums}
.card figcaption{font-size:12.5px;line-height:1.4;color:var(--faint);margin:6px 2px 0}
.legend{display:flex;flex-wrap:wrap;gap:2px 14px;font-size:12.5px;color:var(--soft);margin:0 2px 4px}
.legend b{font-weight:600;color:var(--ink);font-variant-numeric:tabular-nums}
.legend i{display:inline-block;width:10px;height:10px;border-radius:3px;margin-right:5px}
.chart{display:block;width:100%;height:auto;margin-top:auto;overflow:visible}
.chart text{font-size:11px;fill:var(--faint);font-variant-numeric:tabular-nums}
.chart text.value{text-anchor:middle;fill:var(--soft)}
.chart .grid{stroke:var(--grid)}.chart .base{stroke:var(--base)}
.chart line.ref{stroke:var(--faint);stroke-dasharray:3 3}
.chart .line{fill:none;stroke-width:2;stroke-linejoin:round;stroke-linecap:round}
.chart .faint{fill:none;stroke-width:1;opacity:.32}
.chart .dot{stroke:var(--card);stroke-width:2}
.chart .cross{stroke:var(--faint);visibility:hidden}
.time{width:100%;border-collapse:collapse;font-size:13.5px;margin:4px 0 auto}
.time td{padding:4px 6px 4px 2px;white-space:nowrap}
.time td:nth-child(n+3){text-align:right;font-variant-numeric:tabular-nums;color:var(--soft)}
.time .share{width:100%}.time .share i{display:block;height:9px;min-width:1px;border-radius:3px;background:var(--c1)}
.key{display:flex;flex-wrap:wrap;gap:8px 26px;align-items:center;font-size:13px;color:var(--soft);margin:8px 0 14px;
position:sticky;top:0;background:var(--page);padding:8px 0;z-index:1}
.key .bar{display:inline-flex;align-items:center;gap:7px;flex-wrap:wrap}.key b{font-weight:400;color:var(--faint)}
.key .bar i{display:inline-block;width:180px;height:13px;border-radius:4px;border:1px solid var(--edge)}
.swatch{display:inline-block;width:18px;height:14px;border-radius:3px;box-shadow:0 0 0 1.5px var(--outline);
margin-right:4px;vertical-align:-2px}
.hint{color:var(--faint)}
.sample{padding:16px 18px 18px;margin-top:12px}
.sample header{display:flex;flex-wrap:wrap;gap:6px 16px;justify-content:space-between;align-items:center}
.sample h3{font-size:15px;margin:0;font-weight:600}
.sample h4{font-size:12.5px;font-weight:500;color:var(--faint);margin:14px 0 2px}.sample h4 small{font-size:inherit}
.chip{display:inline-block;font-size:12.5px;color:var(--soft);border:1px solid var(--edge);border-radius:99px;
padding:1px 10px;margin:2px 0 2px 5px}
.chip b{color:var(--ink);font-weight:600;font-variant-numeric:tabular-nums}
.chip.good b{color:var(--good)}.chip.bad b{color:var(--bad)}
.sample.wrong{border-left:3px solid var(--bad)}
.body{display:flex;flex-wrap:wrap;gap:4px 26px}
.words{flex:1 1 380px;min-width:0}
.views{flex:1 1 400px;max-width:520px;display:grid;grid-template-columns:repeat(var(--views),minmax(0,1fr));gap:10px;
margin-top:16px;align-content:start}
.views[style="--views:1"]{flex:0 1 167px}
.views figure{margin:0}.views img{display:block;width:100%;height:auto;border-radius:6px;border:1px solid var(--edge)}
.views img.tiny{image-rendering:pixelated}
.views figcaption{font-size:12.5px;margin-top:4px}.views figcaption span{color:var(--faint);display:block}
.question u{text-decoration:none;color:var(--faint);font-size:12px}
.question,.truth{margin:0;white-space:pre-wrap;overflow-wrap:anywhere}.question{max-height:14em;overflow:auto}
.truth{font-weight:600}
.note{font-size:13px;color:var(--faint);margin:2px 0}
.answer{font:13.5px/2 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;max-height:34em;overflow:auto;
padding:3px;overflow-wrap:anywhere}
.tok{border-radius:3px;padding:2px 1px;margin:0 1px;cursor:default;-webkit-box-decoration-break:clone;
box-decoration-break:clone}
.tok.masked{box-shadow:0 0 0 1.5px var(--outline);margin:0 3px}
.tok.special{font-style:italic;color:var(--soft)}
.tok u{text-decoration:none;color:var(--faint)}
.tok:hover{outline:2px solid var(--c1);outline-offset:2px}
.scroll{overflow-x:auto}
.settings{border-collapse:collapse;font-size:13.5px;margin:8px 0 12px}
.settings td{padding:3px 22px 3px 0;border-bottom:1px solid var(--edge);overflow-wrap:anywhere;vertical-align:top}
.settings td:first-child{color:var(--soft);white-space:nowrap}
details{margin:6px 0}summary{cursor:pointer;color:var(--soft)}
pre{background:var(--card);border:1px solid var(--edge);border-radius:8px;padding:12px;overflow:auto;font-size:12.5px}
#tip{position:fixed;z-index:9;pointer-events:none;background:var(--card);border:1px solid var(--base);border-radius:8px;
padding:7px 11px;font-size:12.5px;box-shadow:0 4px 18px rgba(0,0,0,.18);max-width:300px}
#tip table{border-collapse:collapse}#tip td{padding:0 10px 0 0}#tip td+td{text-align:right;padding:0;font-weight:600;
font-variant-numeric:tabular-nums}
#tip i{display:inline-block;width:9px;height:9px;border-radius:3px;margin-right:6px}
#tip header{font-weight:600;margin-bottom:2px;overflow-wrap:anywhere}
@media (max-width:560px){main{padding:22px 12px 40px}.tile strong{font-size:23px}.key{position:static}}
@media print{.sample,.card{break-inside:avoid}.key{position:static}}
"""

# All text is set as text, never as HTML: tokens come from the model.
SCRIPT = """
const tip = document.getElementById("tip");
function show(title, rows, event) {
  const head = document.createElement("header");
  const table = document.createElement("table");
  head.textContent = title;
  for (const [name, value, color] of rows) {
    const cells = table.insertRow();
    const label = cells.insertCell();
    if (color) label.appendChild(document.createElement("i")).style.background = color;
    label.appendChild(document.createTextNode(name));
    cells.insertCell().textContent = value;
  }
  tip.replaceChildren(head, table);
  tip.hidden = false;
  const right = event.clientX + 16 + tip.offsetWidth > innerWidth;
  const low = event.clientY + 16 + tip.offsetHeight > innerHeight;
  tip.style.left = Math.max(4, right ? event.clientX - tip.offsetWidth - 12 : event.clientX + 16) + "px";
  tip.style.top = Math.max(4, low ? event.clientY - tip.offsetHeight - 12 : event.clientY + 16) + "px";
}
for (const chart of document.querySelectorAll("svg.chart")) {
  const data = JSON.parse(chart.dataset.hover);
  const cross = chart.querySelector(".cross");
  chart.addEventListener("pointermove", event => {
    const box = chart.getBoundingClientRect();
    const x = (event.clientX - box.left) / box.width * chart.viewBox.baseVal.width;
    let at = 0;
    data.x.forEach((px, i) => { if (Math.abs(px - x) < Math.abs(data.x[at] - x)) at = i; });
    cross.setAttribute("x1", data.x[at]);
    cross.setAttribute("x2", data.x[at]);
    cross.style.visibility = data.bars ? "hidden" : "visible";
    const rows = data.series.filter(s => s.text[at] !== null).map(s => [s.name, s.text[at], s.color]);
    show(data.label[at], rows, event);
  });
  chart.addEventListener("pointerleave", () => { tip.hidden = true; cross.style.visibility = "hidden"; });
}
const names = ["log-prob", "entropy, original", "entropy, removing", "entropy shift"];
for (const answer of document.querySelectorAll(".answer")) {
  answer.addEventListener("pointermove", event => {
    const token = event.target.closest(".tok");
    if (!token) { tip.hidden = true; return; }
    const rows = token.dataset.v.split("|").map((v, i) => [names[i], v]).filter(row => row[1]);
    if (token.classList.contains("masked")) rows.push(["in the perception mask", ""]);
    show(token.textContent, rows, event);
  });
  answer.addEventListener("pointerleave", () => { tip.hidden = true; });
}
"""
