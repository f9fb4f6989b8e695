"""A walk with the activity of chosen cells: as numbers in walk.json, and as an animation on a page."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llm.common.files import write_json
from llm.common.html import Section, data_element

from .plots import layout
from .spaces import Graph

WALK = "walk.json"
LONGEST = 256  # steps of a walk on a page


def write_walk(folder: Path, run: str, graph: Graph, cells: np.ndarray, activity: Mapping[str, np.ndarray]) -> None:
    """Write walk.json.

    Args:
        folder: of the page.
        run: name of the run.
        graph: where the walk is.
        cells: (steps,), cell of each step.
        activity: (steps,) of each unit, by its name; or one less, without step 0.
    """
    at, side = layout(graph)
    last = min(len(cells), LONGEST)
    units = []
    for name, values in activity.items():
        missing = len(cells) - len(values)
        shown: list[float | None] = [None] * missing
        shown += [float(f"{value:.3g}") if np.isfinite(value) else None for value in values[: last - missing]]
        units.append({"name": name, "activity": shown})
    places = np.round(at / side, 3).tolist()  # sides of a cell's square
    content = {"run": run, "places": places, "cells": cells[:last].tolist(), "units": units}
    write_json(folder / WALK, content, indent=None)


def walk_section(walk: Mapping[str, Any]) -> Section:
    """The section of a page that SCRIPT animates."""
    text = (
        f"A walk of {walk['run']}, and the activity of one unit. The circle is the walker; each visited cell has the "
        "unit's mean activity there so far, from its least (faint) to its greatest (strong). Below is the activity of "
        "each step."
    )
    return Section("A walk", text, markup=f"{MARKUP}\n{data_element('walk', dict(walk))}")


MARKUP = """\
<p><label for="walk-unit">Unit</label> <select id="walk-unit" style="max-width: 100%"></select>
<button type="button" id="walk-play">Play</button></p>
<p><label for="walk-step">Step</label> <input type="range" id="walk-step" min="0" value="0">
<output id="walk-now" for="walk-step walk-unit"></output></p>
<svg id="walk-map" role="img" aria-label="The walk, with the mean activity of the unit at each visited cell"
  style="width: 100%; max-width: 22rem; max-height: 22rem"></svg>
<svg id="walk-trace" role="img" aria-label="Activity of the unit over steps" viewBox="0 0 400 80"
  style="width: 100%; max-width: 44rem; margin-top: 0.8rem"></svg>"""

SCRIPT = """
"use strict";
(() => {
  const walk = JSON.parse(document.getElementById("walk").textContent);
  const [unit, play, step, now, map, trace] =
    ["unit", "play", "step", "now", "map", "trace"].map(name => document.getElementById("walk-" + name));
  const make = (parent, kind, attributes) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", kind);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    return parent.appendChild(element);
  };
  walk.units.forEach((each, index) => unit.add(new Option(each.name, index)));
  step.max = walk.cells.length - 1;
  const xs = walk.places.map(at => at[0]), ys = walk.places.map(at => at[1]);
  const left = Math.min(...xs) - 0.7, top = Math.min(...ys) - 0.7;
  map.setAttribute("viewBox", `${left} ${top} ${Math.max(...xs) - left + 0.7} ${Math.max(...ys) - top + 0.7}`);
  const squares = walk.places.map(([x, y]) => make(map, "rect", {
    x: x - 0.47, y: y - 0.47, width: 0.94, height: 0.94, fill: "var(--series-1)", "fill-opacity": 0.04,
    stroke: "currentColor", "stroke-opacity": 0.3, "stroke-width": 0.03 }));
  const walker = make(map, "circle", { r: 0.2, fill: "var(--series-2)" });
  const line = make(trace, "path", { fill: "none", stroke: "var(--series-1)", "stroke-width": 1.2 });
  const cursor = make(trace, "line", { y1: 0, y2: 80, stroke: "var(--series-2)", "stroke-width": 1.5 });
  const across = t => 400 * t / Math.max(1, walk.cells.length - 1);

  function draw() {
    const values = walk.units[unit.value].activity, t = Number(step.value);
    const known = values.filter(value => value !== null);
    const low = Math.min(...known), span = Math.max(...known) - low || 1;
    const sums = walk.places.map(() => [0, 0]);
    for (let s = 0; s <= t; s++) if (values[s] !== null) {
      sums[walk.cells[s]][0] += values[s]; sums[walk.cells[s]][1] += 1;
    }
    squares.forEach((square, cell) => {
      const [sum, visits] = sums[cell];
      square.setAttribute("fill-opacity", visits ? 0.08 + 0.92 * (sum / visits - low) / span : 0);
    });
    walker.setAttribute("cx", xs[walk.cells[t]]);
    walker.setAttribute("cy", ys[walk.cells[t]]);
    line.setAttribute("d", values.map((value, s) => value === null ? "" :
      `${s && values[s - 1] !== null ? "L" : "M"}${across(s).toFixed(1)} ${(76 - 72 * (value - low) / span).toFixed(1)}`
    ).join(""));
    cursor.setAttribute("x1", across(t));
    cursor.setAttribute("x2", across(t));
    const active = values[t] === null ? "" : `, activity ${values[t]}`.replace("-", "−");
    now.textContent = `${t} of ${step.max}${active}`;
  }
  let timer = null;
  const stop = () => { clearInterval(timer); timer = null; play.textContent = "Play"; };
  play.addEventListener("click", () => {
    if (timer !== null) return stop();
    if (step.value === step.max) step.value = 0;
    play.textContent = "Pause";
    timer = setInterval(() => {
      step.value = Number(step.value) + 1;
      draw();
      if (step.value === step.max) stop();
    }, 120);
  });
  step.addEventListener("input", draw);
  unit.addEventListener("change", draw);
  draw();
})();
"""
