'use strict';
// Maps, pictures and colours: reads what tracking/html.py stored, and draws as visualization/overlay.py does.

/**
 * What is stored for a method. Snapshots and images are counted from 0; null is a value that is not finite.
 * @typedef {object} Method
 * @property {[number, number]} grid  rows and columns of patches
 * @property {number} limit  upper end of the colours, in multiples of uniform relevance
 * @property {boolean} signed  whether its maps have negative values
 * @property {string[]} maps  of each snapshot: base64 of a record for each image, see visualization/quantise.py
 * @property {(number | null)[][]} drift  rank correlation with the baseline, by snapshot and image
 * @property {Record<string, (number | null)[][]>} lift  of each region, by snapshot and image
 */
/**
 * @typedef {{name: string, values: (number | null)[], low?: (number | null)[], high?: (number | null)[],
 *   reference?: boolean}} Line
 * @typedef {{title: string, note: string, method: string | null, range: [number, number] | null, lines: Line[]}} Chart
 */
/**
 * @typedef {object} Run
 * @property {string} name
 * @property {number} taken  snapshots of the run, shown or not
 * @property {number[]} steps  of the snapshots shown
 * @property {(number | null)[][] | null} output  of a regression, by snapshot and image; null for a classifier
 * @property {number[][]} prediction  class, by snapshot and image
 * @property {(number | null)[][]} confidence  probability of the predicted class
 * @property {number[]} target  class of each image that the gradients are of
 * @property {(number | null)[][]} target_probability
 * @property {Record<string, Method>} methods
 * @property {Chart[]} charts
 * @property {Record<string, (number | null)[][]>} blocks  by name: values by block and snapshot
 * @property {Record<string, (number | null)[]>} scalars  by tag
 */
/**
 * @typedef {object} Data
 * @property {number} written  seconds since 1970
 * @property {number} images
 * @property {[number, number]} size  height and width of the pictures
 * @property {string[]} pictures  JPEG in base64
 * @property {(number | null)[] | null} labels
 * @property {Record<number, string>} classes  names
 * @property {Record<string, string[]>} regions  a PNG of the mask for each image, in base64
 * @property {string} colours  of the values from −1 to 1 in RGBA, in base64; see visualization/quantise.py
 * @property {number} floor  the darkest grey of a picture under a map, from 0 to 1
 * @property {Run[]} runs
 */
/** @typedef {{width: number, height: number, colour: Uint8ClampedArray, faded: Uint8ClampedArray}} Picture */
/**
 * A map as it is drawn: its values in shares of the limit, row by row.
 * @typedef {{values: Float32Array, grid: [number, number]}} Layer
 */
/**
 * `plain`: the picture alone; `alone`: the map alone, on white.
 * @typedef {{strength: number, smooth: boolean, plain: boolean, alone: boolean}} Look
 */

/** @type {Data} */
const data = JSON.parse(/** @type {HTMLElement} */ (document.getElementById('data')).textContent || '');

/**
 * The bytes from `start` on that a base64 text stands for; only the part that is needed is decoded.
 * @param {string} text
 * @param {number} start
 * @param {number} count
 */
function bytesOf(text, start, count) {
  const group = Math.floor(start / 3);
  const binary = atob(text.slice(group * 4, Math.ceil((start + count) / 3) * 4));
  const bytes = new Uint8Array(count);
  for (let i = 0; i < count; i++) bytes[i] = binary.charCodeAt(start - group * 3 + i);
  return bytes;
}

const colours = bytesOf(data.colours, 0, 4 * 511);

/**
 * The place of a value, a share of the limit, among the colours.
 * @param {number} value
 */
function placeOf(value) {
  return Math.round(255 * (Math.min(Math.max(value, -1), 1) + 1));
}

/**
 * A map in multiples of uniform relevance, row by row; null where it is degenerate.
 * @param {Method} method
 * @param {number} snapshot
 * @param {number} image
 */
function mapOf(method, snapshot, image) {
  const patches = method.grid[0] * method.grid[1];
  const record = bytesOf(method.maps[snapshot], image * (8 + patches), 8 + patches);
  const [low, high] = [0, 4].map((place) => new DataView(record.buffer).getFloat32(place, true));
  if (Number.isNaN(low)) return null;
  const values = new Float32Array(patches);
  for (let i = 0; i < patches; i++) values[i] = low + ((high - low) * record[8 + i]) / 255;
  return values;
}

/**
 * The place in the table at each pixel: one flat colour a patch.
 * @param {Layer} layer
 * @param {number} width
 * @param {number} height
 */
function patchIndices({ values, grid: [rows, columns] }, width, height) {
  const indices = new Uint16Array(width * height);
  for (let y = 0, drawn = -1; y < height; y++) {
    const row = Math.floor((y * rows) / height);
    if (row === drawn) {
      indices.copyWithin(y * width, (y - 1) * width, y * width);
      continue;
    }
    drawn = row;
    for (let x = 0; x < width; x++) {
      indices[y * width + x] = placeOf(values[row * columns + Math.floor((x * columns) / width)]);
    }
  }
  return indices;
}

/**
 * The same, but going over from patch to patch: bilinear between their centres.
 * @param {Layer} layer
 * @param {number} width
 * @param {number} height
 */
function smoothIndices({ values, grid: [rows, columns] }, width, height) {
  /** @param {number} pixel @param {number} pixels @param {number} count */
  const between = (pixel, pixels, count) => {
    const place = Math.min(Math.max(((pixel + 0.5) * count) / pixels - 0.5, 0), count - 1);
    const first = Math.min(Math.floor(place), Math.max(count - 2, 0));
    return { first, second: Math.min(first + 1, count - 1), share: place - first };
  };
  const across = Array.from({ length: width }, (_, x) => between(x, width, columns));
  const indices = new Uint16Array(width * height);
  for (let y = 0; y < height; y++) {
    const down = between(y, height, rows);
    const [upper, lower] = [down.first * columns, down.second * columns];
    for (let x = 0; x < width; x++) {
      const { first, second, share } = across[x];
      const above = values[upper + first] * (1 - share) + values[upper + second] * share;
      const below = values[lower + first] * (1 - share) + values[lower + second] * share;
      indices[y * width + x] = placeOf(above * (1 - down.share) + below * down.share);
    }
  }
  return indices;
}

/**
 * Each colour as what it adds to a pixel, colour · a, and what it leaves of it, 1 − a.
 * @param {Look} look
 */
function mixedColours(look) {
  const strength = look.alone ? 255 / colours[3] : look.strength; // at the ends of the scale a map alone is opaque
  const mixed = new Float32Array(colours.length);
  for (let i = 0; i < colours.length; i += 4) {
    const opacity = (colours[i + 3] / 255) * strength;
    for (let channel = i; channel < i + 3; channel++) mixed[channel] = colours[channel] * opacity;
    mixed[i + 3] = 1 - opacity;
  }
  return mixed;
}

/**
 * Draw a picture with a layer on it: picture · (1 − a) + colour · a, a being the colour's own strength.
 * @param {HTMLCanvasElement} canvas
 * @param {Picture} picture
 * @param {Layer | null} layer
 * @param {Look} look
 */
function paint(canvas, picture, layer, look) {
  const { width, height } = picture;
  if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
  const context = /** @type {CanvasRenderingContext2D} */ (canvas.getContext('2d', { willReadFrequently: true }));
  const image = new ImageData(width, height);
  const pixels = image.data;
  if (look.alone) pixels.fill(255);
  else pixels.set(look.plain ? picture.colour : picture.faded);
  if (layer && !look.plain) {
    const indices = (look.smooth ? smoothIndices : patchIndices)(layer, width, height);
    const mixed = mixedColours(look);
    for (let i = 0, p = 0; i < indices.length; i++, p += 4) {
      const c = indices[i] * 4;
      pixels[p] = pixels[p] * mixed[c + 3] + mixed[c];
      pixels[p + 1] = pixels[p + 1] * mixed[c + 3] + mixed[c + 1];
      pixels[p + 2] = pixels[p + 2] * mixed[c + 3] + mixed[c + 2];
    }
  }
  context.putImageData(image, 0, 0);
}

/**
 * The RGBA pixels of an image file.
 * @param {string} kind
 * @param {string} text  the file in base64
 */
async function pixelsOf(kind, text) {
  const image = new Image();
  image.src = `data:image/${kind};base64,${text}`;
  await image.decode();
  const canvas = Object.assign(document.createElement('canvas'), { width: image.width, height: image.height });
  const context = /** @type {CanvasRenderingContext2D} */ (canvas.getContext('2d', { willReadFrequently: true }));
  context.drawImage(image, 0, 0);
  return context.getImageData(0, 0, image.width, image.height);
}

/**
 * The picture of a probe image.
 * @param {number} image
 * @returns {Promise<Picture>}
 */
async function pictureOf(image) {
  const { data: colour, width, height } = await pixelsOf('jpeg', data.pictures[image]);
  const faded = new Uint8ClampedArray(colour);
  for (let p = 0; p < faded.length; p += 4) {
    const grey = 0.299 * colour[p] + 0.587 * colour[p + 1] + 0.114 * colour[p + 2];
    faded.fill(255 * data.floor + (1 - data.floor) * grey, p, p + 3);
  }
  return { width, height, colour, faded };
}

/** In the order of the lines' colours, and bright whatever the page's own are: pictures are as dark as they are. */
const OUTLINES = ['#56b4e9', '#f08a3c', '#2fc79a', '#e3a1c8', '#f0e442', '#8fb8ff'];

/**
 * Draw the outlines of an image's regions, each in its colour on a dark edge.
 * @param {HTMLCanvasElement} canvas
 * @param {number} image
 */
async function paintOutlines(canvas, image) {
  const { width, height } = canvas;
  const context = /** @type {CanvasRenderingContext2D} */ (canvas.getContext('2d'));
  const size = Math.max(1, Math.max(width, height) / 150);
  for (const [index, masks] of Object.values(data.regions).entries()) {
    const mask = (await pixelsOf('png', masks[image])).data;
    /** @param {number} x @param {number} y */
    const inside = (x, y) => x >= 0 && y >= 0 && x < width && y < height && mask[(y * width + x) * 4] > 0;
    const edge = [];
    for (let y = 0; y < height; y++) {
      for (let x = 0; x < width; x++) {
        const within = inside(x - 1, y) && inside(x + 1, y) && inside(x, y - 1) && inside(x, y + 1);
        if (inside(x, y) && !within) edge.push([x, y]);
      }
    }
    for (const [colour, wide] of /** @type {[string, number][]} */ ([
      ['#000', 1.8 * size],
      [OUTLINES[index % OUTLINES.length], size],
    ])) {
      context.fillStyle = colour;
      for (const [x, y] of edge) context.fillRect(x + 0.5 - wide / 2, y + 0.5 - wide / 2, wide, wide);
    }
  }
}
