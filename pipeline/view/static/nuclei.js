// The nuclei of a slide: loaded by tile, drawn on a canvas. Positions are slide px from the corner of the slide's bounds.

import { ask } from "./ask.js";

const MOST_TILES = 300; // kept in memory

// Stops of a colour map from few nuclei to many: viridis without its purple, which stains have.
const RAMP = [[59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]];

/** Read a tile in the format that pipeline/view/nuclei.py describes. */
function decode(buffer) {
  const [count, vertices] = new Uint32Array(buffer, 0, 2);
  const [quantum] = new Float32Array(buffer, 8, 1);
  let at = 12;
  const take = (type, length) => {
    const values = new type(buffer, at, length);
    at += values.byteLength;
    return values;
  };
  const tile = {
    quantum,
    rows: take(Uint32Array, count),
    scores: take(Float32Array, count),
    starts: take(Uint32Array, count + 1),
    xy: take(Int16Array, 2 * vertices),
    classes: take(Uint16Array, count),
  };
  tile.boxes = boxes(tile);
  return tile;
}

/** The box of each outline: x0 y0 x1 y1, quanta from the middle of the tile. */
function boxes({ starts, xy }) {
  const found = new Int16Array(4 * (starts.length - 1));
  for (let i = 0; i + 1 < starts.length; i++) {
    let [x0, y0, x1, y1] = [32767, 32767, -32768, -32768];
    for (let v = 2 * starts[i]; v < 2 * starts[i + 1]; v += 2) {
      x0 = Math.min(x0, xy[v]);
      x1 = Math.max(x1, xy[v]);
      y0 = Math.min(y0, xy[v + 1]);
      y1 = Math.max(y1, xy[v + 1]);
    }
    found.set([x0, y0, x1, y1], 4 * i);
  }
  return found;
}

/** Add the outline of nucleus `i` of a tile to a path, in quanta. */
function trace(path, { starts, xy }, i) {
  for (let v = 2 * starts[i]; v < 2 * starts[i + 1]; v += 2) {
    if (v === 2 * starts[i]) path.moveTo(xy[v], xy[v + 1]);
    else path.lineTo(xy[v], xy[v + 1]);
  }
  path.closePath();
}

/** Whether (x, y), in quanta, lies inside nucleus `i` of a tile: the even-odd rule. */
function contains({ starts, xy, boxes }, i, x, y) {
  if (x < boxes[4 * i] || y < boxes[4 * i + 1] || x > boxes[4 * i + 2] || y > boxes[4 * i + 3]) return false;
  let inside = false;
  for (let v = 2 * starts[i], w = 2 * starts[i + 1] - 2; v < 2 * starts[i + 1]; w = v, v += 2) {
    const crosses = xy[v + 1] > y !== xy[w + 1] > y;
    if (crosses && x < ((xy[w] - xy[v]) * (y - xy[v + 1])) / (xy[w + 1] - xy[v + 1]) + xy[v]) inside = !inside;
  }
  return inside;
}

export class Outlines {
  /**
   * about: nuclei.json; chosen: {score, classes: a Set of class numbers}, which may change before `choose`;
   * changed: called when there is more to draw; failed: called with the error where a tile is not answered.
   */
  constructor(about, chosen, changed, failed) {
    this.about = about;
    this.chosen = chosen;
    this.changed = changed;
    this.failed = failed;
    this.tiles = new Map(); // "col_row" -> a tile, or null while it is loading; the latest used is the last
    this.colours = about.classes.map(({ colour }) => `rgb(${colour.join(",")})`);
  }

  /** Another score or other classes were chosen. */
  choose() {
    for (const tile of this.tiles.values()) if (tile) tile.paths = null;
  }

  /** Draw what lies in a box {x0, y0, x1, y1}, and load what is missing. Returns how many nuclei of its tiles. */
  draw(context, view, box) {
    let drawn = 0;
    for (const tile of this.within(box)) {
      tile.paths ??= this.paths(tile);
      this.transform(context, view, tile);
      context.lineWidth = 1.5 / (view.scale * tile.quantum);
      tile.paths.forEach((path, number) => {
        context.strokeStyle = this.colours[number];
        context.stroke(path);
      });
      drawn += tile.shown;
    }
    return drawn;
  }

  /** Draw one nucleus, as `at` gave it, with a light filling. */
  highlight(context, view, { tile, i }) {
    const path = new Path2D();
    trace(path, tile, i);
    this.transform(context, view, tile);
    context.lineWidth = 3 / (view.scale * tile.quantum);
    context.strokeStyle = "#ffffff";
    context.stroke(path);
    context.lineWidth /= 2;
    context.strokeStyle = this.colours[tile.classes[i]];
    context.stroke(path);
    context.fillStyle = "rgb(255 255 255 / 0.25)";
    context.fill(path);
  }

  /** The nucleus at a point: {tile, i, row}; null where none is shown. */
  at(x, y) {
    for (const tile of this.within({ x0: x, y0: y, x1: x, y1: y })) {
      const [qx, qy] = [(x - tile.x) / tile.quantum, (y - tile.y) / tile.quantum];
      for (let i = 0; i < tile.rows.length; i++) {
        if (this.isShown(tile, i) && contains(tile, i, qx, qy)) return { tile, i, row: tile.rows[i] };
      }
    }
    return null;
  }

  isShown(tile, i) {
    return tile.scores[i] >= this.chosen.score && this.chosen.classes.has(tile.classes[i]);
  }

  /** The loaded tiles whose nuclei may reach into a box; the others are loaded. */
  within({ x0, y0, x1, y1 }) {
    const { tile_px, tiles: [cols, rows], overhang_px } = this.about;
    const reach = Math.min(overhang_px, tile_px);
    const number = (position, count) => Math.max(0, Math.min(count - 1, Math.floor(position / tile_px)));
    const found = [];
    for (let row = number(y0 - reach, rows); row <= number(y1 + reach, rows); row++) {
      for (let col = number(x0 - reach, cols); col <= number(x1 + reach, cols); col++) {
        const tile = this.tile(col, row);
        if (tile) found.push(tile);
      }
    }
    return found;
  }

  tile(col, row) {
    const key = `${col}_${row}`;
    const tile = this.tiles.get(key);
    if (tile === undefined) {
      this.tiles.set(key, null);
      this.load(key, col, row).catch(this.failed);
    } else if (tile) {
      this.tiles.delete(key);
      this.tiles.set(key, tile);
    }
    return tile;
  }

  async load(key, col, row) {
    const { tile_px } = this.about;
    try {
      const response = await ask(`nuclei/${key}.bin`);
      const tile = decode(await response.arrayBuffer());
      this.tiles.set(key, Object.assign(tile, { x: (col + 0.5) * tile_px, y: (row + 0.5) * tile_px }));
    } catch (error) {
      this.tiles.delete(key); // it is asked for again when the view changes
      throw error;
    }
    for (const [old, tile] of this.tiles) {
      if (this.tiles.size <= MOST_TILES) break;
      if (tile) this.tiles.delete(old);
    }
    this.changed();
  }

  /** A path for each class, of the nuclei that are shown. */
  paths(tile) {
    const paths = this.colours.map(() => new Path2D());
    tile.shown = 0;
    for (let i = 0; i < tile.rows.length; i++) {
      if (!this.isShown(tile, i)) continue;
      trace(paths[tile.classes[i]], tile, i);
      tile.shown++;
    }
    return paths;
  }

  transform(context, { scale, x, y }, tile) {
    const size = scale * tile.quantum;
    context.setTransform(size, 0, 0, size, x + tile.x * scale, y + tile.y * scale);
  }
}

export class Density {
  constructor(about) {
    this.about = about;
    const [cols, rows] = about.cells;
    this.canvas = Object.assign(document.createElement("canvas"), { width: cols, height: rows });
    this.counts = new Uint32Array(cols * rows);
    const um2 = about.cell_px[0] * about.um_per_px[0] * about.cell_px[1] * about.um_per_px[1];
    this.perMm2 = 1e6 / um2; // of one nucleus in a cell
    this.asked = 0; // how often counts were asked for
    this.most = 0; // nuclei in a cell at the end of the colour map: that of 99 % of the cells that have any
  }

  /** Take the counts of what is chosen, unless others were asked for before the answer came. */
  async load({ score, classes }) {
    const asked = ++this.asked;
    const query = new URLSearchParams([["score", score], ...[...classes].map((number) => ["class", number])]);
    const response = await ask(`density.bin?${query}`);
    const counts = new Uint32Array(await response.arrayBuffer());
    if (!this.most) {
      const filled = counts.filter((count) => count).sort();
      this.most = filled[Math.floor(0.99 * (filled.length - 1))] ?? 1;
    }
    if (asked !== this.asked) return;
    this.counts = counts;
    this.paint();
  }

  paint() {
    const context = this.canvas.getContext("2d");
    const image = context.createImageData(this.canvas.width, this.canvas.height);
    this.counts.forEach((count, cell) => {
      const share = Math.min(1, count / this.most);
      image.data.set([...colour(share), count ? 60 + 160 * share : 0], 4 * cell);
    });
    context.putImageData(image, 0, 0);
  }

  /** Nuclei in the cells that a box {x0, y0, x1, y1} touches. */
  within({ x0, y0, x1, y1 }) {
    const { cell_px: [width, height], cells: [cols, rows] } = this.about;
    let sum = 0;
    for (let row = Math.max(0, Math.floor(y0 / height)); row < Math.min(rows, y1 / height); row++) {
      for (let col = Math.max(0, Math.floor(x0 / width)); col < Math.min(cols, x1 / width); col++) {
        sum += this.counts[row * cols + col];
      }
    }
    return sum;
  }

  draw(context, { scale, x, y }) {
    const { cell_px: [width, height], cells: [cols, rows], size } = this.about;
    context.setTransform(scale, 0, 0, scale, x, y);
    context.save();
    context.beginPath();
    context.rect(0, 0, ...size); // the last cells hang over the slide
    context.clip();
    context.imageSmoothingQuality = "high";
    context.drawImage(this.canvas, 0, 0, cols * width, rows * height);
    context.restore();
  }
}

/** The colour of a share from 0 to 1 of the colour map: red, green, blue. */
function colour(share) {
  const at = share * (RAMP.length - 1);
  const low = Math.min(Math.floor(at), RAMP.length - 2);
  return RAMP[low].map((value, i) => value + (at - low) * (RAMP[low + 1][i] - value));
}
