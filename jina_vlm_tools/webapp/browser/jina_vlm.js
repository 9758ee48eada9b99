// jina-vlm in a browser, by transformers.js: cuts images into tiles, writes the prompt, and streams the answer. The
// functions up to `JinaVLM` need neither the library nor a browser; their numbers are those of the Python package.

const MAX_ASPECT_RATIO = 200;
const MAX_IMAGE_TOKENS = 40960;
const IMAGE_TOKEN = "<|image|>";

// --------------------------------------------------------------------------------------------------------------------
// Geometry
// --------------------------------------------------------------------------------------------------------------------

/** Round a number that is not negative, halves to the even one. */
function round(number) {
  const below = Math.floor(number);
  const rest = number - below;
  return rest > 0.5 || (rest === 0.5 && below % 2 === 1) ? below + 1 : below;
}

/** Fit a size to a budget of pixels; both sides of the result, [height, width], are multiples of a patch. */
export function smartResize(height, width, { patch_size: patch, min_pixels: least, max_pixels: most }) {
  if (Math.max(height, width) > MAX_ASPECT_RATIO * Math.min(height, width)) {
    throw new Error(
      `The image is ${width} x ${height} pixels; its longer side may be at most ${MAX_ASPECT_RATIO} times the ` +
        "shorter. Crop it.",
    );
  }
  const fitted = [height, width].map((side) => round(side / patch) * patch);
  const area = fitted[0] * fitted[1];
  if (area > most) {
    const shrink = Math.sqrt((height * width) / most);
    return [height, width].map((side) => Math.max(patch, Math.floor(side / shrink / patch) * patch));
  }
  if (area < least) {
    const grow = Math.sqrt(least / (height * width));
    return [height, width].map((side) => Math.ceil((side * grow) / patch) * patch);
  }
  return fitted;
}

/** Choose the grid, [rows, columns], whose canvas changes the scale of an image least. */
export function selectTiling(height, width, tile, stride, maxTiles) {
  const margin = tile - stride;
  const scaleOf = (side, count) => (side === margin ? Infinity : (stride * count) / (side - margin));
  // More rows or columns would only enlarge more.
  const [mostRows, mostColumns] = [height, width].map((side) => Math.max(1, Math.ceil((side - margin) / stride) + 1));
  const grids = [];
  for (let rows = 1; rows <= Math.min(maxTiles, mostRows); rows++) {
    for (let columns = 1; columns <= Math.min(Math.floor(maxTiles / rows), mostColumns); columns++) {
      const scale = Math.min(scaleOf(height, rows), scaleOf(width, columns));
      grids.push({ rows, columns, tiles: rows * columns, scale });
    }
  }
  const shrinksAlways = grids.every(({ scale }) => scale < 1);
  const cost = ({ scale }) => (shrinksAlways ? -scale : scale < 1 ? 1e10 : scale);
  // Of grids that cost the same the one of fewer tiles, then of fewer rows. Two may cost Infinity.
  const compare = (a, b) => (cost(a) === cost(b) ? 0 : cost(a) - cost(b)) || a.tiles - b.tiles || a.rows - b.rows;
  const { rows, columns } = grids.reduce((best, grid) => (compare(grid, best) < 0 ? grid : best));
  return [rows, columns];
}

function strideOf({ tile_size: tile, patch_size: patch, overlap_margin: margin }) {
  return tile - 2 * margin * patch;
}

/** [rows, columns] of the tokens of a grid of tiles, without their overlaps. */
export function tokenGrid(rows, columns, { tile_size: tile, patch_size: patch, pooling_size: pool, overlap_margin }) {
  const overlap = Math.floor(overlap_margin / pool);
  const step = Math.ceil(Math.floor(tile / patch) / pool) - 2 * overlap;
  return [step * rows + 2 * overlap, step * columns + 2 * overlap];
}

/**
 * What an image becomes: the size to which it is fitted, [height, width] in pixels, and the grid, [rows, columns].
 * `settings` are those of `image_processor` in processor_config.json.
 */
export function getTiling(height, width, settings) {
  if (height < 1 || width < 1) {
    throw new Error(`The image is ${width} x ${height} pixels; both sides must be at least 1.`);
  }
  const size = settings.do_resize ? smartResize(height, width, settings) : [height, width];
  const grid = selectTiling(...size, settings.tile_size, strideOf(settings), settings.max_tiles);
  const tokens = [[1, 1], grid]
    .map(([rows, columns]) => tokenGrid(rows, columns, settings))
    .reduce((sum, [rows, columns]) => sum + 2 + rows * (columns + 1), 0);
  if (tokens > MAX_IMAGE_TOKENS) {
    throw new Error(
      `The image is ${width} x ${height} pixels and becomes ${tokens} tokens; the model takes ${MAX_IMAGE_TOKENS}. ` +
        "Shrink the image.",
    );
  }
  return { size, grid };
}

/** [row, column, rows, columns] of the thumbnail, whose place is -1, and of each tile. */
export function tilePositions(rows, columns) {
  const positions = [[-1, -1, rows, columns]];
  for (let row = 0; row < rows; row++) {
    for (let column = 0; column < columns; column++) positions.push([row, column, rows, columns]);
  }
  return positions;
}

/** The text that stands for an image: a block of tokens for its thumbnail, and one for its tiles. */
export function imageText(rows, columns, settings) {
  return [
    [1, 1],
    [rows, columns],
  ]
    .map((grid) => tokenGrid(...grid, settings))
    .map(([height, width]) => `<im_start>${("<im_patch>".repeat(width) + "<im_col>").repeat(height)}<im_end>`)
    .join("");
}

// --------------------------------------------------------------------------------------------------------------------
// Pixels
// --------------------------------------------------------------------------------------------------------------------

/** For each pixel of a resized line the two that it lies between, and their weights, in float32. */
function neighbors(length, resized) {
  const scale = Math.fround(length / resized);
  return Array.from({ length: resized }, (_, index) => {
    const place = Math.max(0, Math.fround((index + 0.5) * scale - 0.5));
    const first = Math.min(Math.floor(place), length - 1);
    const weight = Math.min(Math.fround(place - first), 1);
    return [first, Math.min(first + 1, length - 1), Math.fround(1 - weight), weight];
  });
}

const mix = (one, weight, other, otherWeight) => Math.fround(one * weight + Math.fround(other * otherWeight));

/** Resize a plane, `{ data, height, width }`: bilinear, without antialiasing, with the bits of the released model. */
export function resize(plane, height, width) {
  const columns = neighbors(plane.width, width);
  const data = new Float32Array(height * width);
  const lines = new Map();
  const line = (row) => {
    if (!lines.has(row)) {
      if (lines.size > 1) lines.delete(lines.keys().next().value);
      const start = row * plane.width;
      const mixed = columns.map(([left, right, leftWeight, rightWeight]) =>
        mix(plane.data[start + left], leftWeight, plane.data[start + right], rightWeight),
      );
      lines.set(row, Float32Array.from(mixed));
    }
    return lines.get(row);
  };
  neighbors(plane.height, height).forEach(([above, below, aboveWeight, belowWeight], row) => {
    const [one, other] = [line(above), line(below)];
    for (let column = 0; column < width; column++) {
      data[row * width + column] = mix(one[column], aboveWeight, other[column], belowWeight);
    }
  });
  return { data, height, width };
}

/** One channel of `{ data, height, width }`, whose data are four bytes a pixel, resized and rounded to bytes. */
function resizeChannel({ data, height, width }, channel, [newHeight, newWidth]) {
  const plane = { data: Uint8Array.from({ length: height * width }, (_, i) => data[4 * i + channel]), height, width };
  if (height === newHeight && width === newWidth) return plane;
  const resized = resize(plane, newHeight, newWidth);
  return { ...resized, data: resized.data.map(round) };
}

/**
 * Cut an image, `{ data, height, width }` as a canvas gives it, into its thumbnail and tiles.
 *
 * Returns `pixelValues`, float32 in [-1, 1] of the dimensions `dims`; `positions` of the tiles; and the `grid`.
 */
export function makeTiles(image, settings) {
  const { size, grid } = getTiling(image.height, image.width, settings);
  const [rows, columns] = grid;
  const [side, stride] = [settings.tile_size, strideOf(settings)];
  const views = [
    [side, side],
    [side + stride * (rows - 1), side + stride * (columns - 1)],
  ];
  const positions = tilePositions(rows, columns);
  const dims = [positions.length, 3, side, side];
  const pixelValues = new Float32Array(dims.reduce((product, length) => product * length));
  for (let channel = 0; channel < 3; channel++) {
    const planes = (settings.do_resize ? [size] : views).map((view) => {
      const plane = resizeChannel(image, channel, view);
      return { ...plane, data: Float32Array.from(plane.data, (value) => value / 255) };
    });
    const [thumbnail, canvas] = views.map((view, index) => {
      const plane = settings.do_resize ? resize(planes[0], ...view) : planes[index];
      return plane.data.map((value) => Math.fround(Math.fround(Math.min(Math.max(value, 0), 1) * 2) - 1));
    });
    positions.forEach(([row, column], tile) => {
      const start = (tile * 3 + channel) * side * side;
      if (row < 0) {
        pixelValues.set(thumbnail, start);
        return;
      }
      for (let y = 0; y < side; y++) {
        const from = (row * stride + y) * views[1][1] + column * stride;
        pixelValues.set(canvas.subarray(from, from + side), start + y * side);
      }
    });
  }
  return { pixelValues, dims, positions, grid };
}

/** Read an image file upright, transparency on white: `{ data, height, width }`, four bytes a pixel. */
export async function readImage(file) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(file, { imageOrientation: "from-image", colorSpaceConversion: "none" });
  } catch (error) {
    throw new Error(`${file.name ?? "The file"} is no image that this browser reads.`, { cause: error });
  }
  const canvas = new OffscreenCanvas(bitmap.width, bitmap.height);
  const context = canvas.getContext("2d");
  context.fillStyle = "white";
  context.fillRect(0, 0, bitmap.width, bitmap.height);
  context.drawImage(bitmap, 0, 0);
  bitmap.close();
  return context.getImageData(0, 0, canvas.width, canvas.height);
}

// --------------------------------------------------------------------------------------------------------------------
// The model
// --------------------------------------------------------------------------------------------------------------------

export class JinaVLM {
  /**
   * Load a folder that `jina-vlm convert --to transformers.js` made.
   *
   * @param {string} folder Its path, as the page sees it.
   * @param {object} options Of transformers.js's `from_pretrained`, such as `device`; and `onFile`, which is called with
   * the name of each file that is fetched. A `progress_callback` makes it ask for each file twice.
   */
  static async load(folder = ".", { onFile = () => {}, ...options } = {}) {
    const library = await import("@huggingface/transformers");
    Object.assign(library.env, { allowLocalModels: true, allowRemoteModels: false, localModelPath: "./" });
    library.env.useBrowserCache = false; // a folder may be converted anew
    library.env.fetch = (address, settings) => {
      onFile(String(address).split("/").pop());
      return fetch(address, settings);
    };
    const runtime = runtimeFolder();
    if (runtime) library.env.backends.onnx.wasm.wasmPaths = runtime;
    const response = await fetch(`${folder}/processor_config.json`);
    if (!response.ok) throw new Error(`${folder} has no processor_config.json: is it a converted folder?`);
    const { image_processor: settings } = await response.json();
    const tokenizer = await library.AutoTokenizer.from_pretrained(folder, options);
    const model = await library.AutoModelForImageTextToText.from_pretrained(folder, options);
    return new JinaVLM(library, settings, tokenizer, model);
  }

  constructor(library, settings, tokenizer, model) {
    Object.assign(this, { library, settings, tokenizer, model });
    model.forward_params.push("tile_positions"); // others are not passed on to the graphs
    const forward = model.forward.bind(model);
    model.forward = async (inputs) => {
      await new Promise((resolve) => setTimeout(resolve)); // lets the page show what there is
      return forward(inputs);
    };
  }

  /**
   * Make the model's inputs of a chat.
   *
   * @param {object[]} messages Each with `role` and `content`, a list of `{ type: "text", text }` and `{ type: "image",
   * image }`, whose `image` is what `readImage` gives. The last one is the user's.
   */
  prepare(messages) {
    const images = messages.flatMap(({ content }) => content.filter(({ type }) => type === "image"));
    const tiles = images.map(({ image }) => makeTiles(image, this.settings));
    const plain = messages.map(({ role, content }) => ({
      role,
      content: content.map(({ type, text }) => (type === "image" ? { type } : { type, text })),
    }));
    const prompt = this.tokenizer.apply_chat_template(plain, { tokenize: false, add_generation_prompt: true });
    const texts = tiles.map(({ grid }) => imageText(...grid, this.settings));
    const expanded = prompt.replaceAll(IMAGE_TOKEN, () => texts.shift());
    const inputs = this.tokenizer(expanded, { add_special_tokens: false });
    const length = inputs.input_ids.dims[1];
    const most = this.model.config.max_position_embeddings;
    if (length >= most) {
      throw new Error(`Images and text make ${length} tokens; the model takes ${most}. Shorten the text, or ask anew.`);
    }
    if (!tiles.length) return inputs;
    const { Tensor } = this.library;
    const pixels = tiles.map(({ pixelValues, dims }) => new Tensor("float32", pixelValues, dims));
    const positions = tiles.flatMap((tile) => tile.positions);
    return {
      ...inputs,
      pixel_values: this.library.cat(pixels, 0),
      tile_positions: new Tensor("int64", BigInt64Array.from(positions.flat(), BigInt), [positions.length, 4]),
    };
  }

  /**
   * Answer the last message of a chat by the likeliest tokens.
   *
   * @param {object} options `onText` is called with each piece of the answer; `signal`, an AbortSignal, ends it.
   * @returns `text`, its `tokens`, and how many the prompt has, `promptTokens`.
   */
  async answer(messages, { onText = () => {}, maxNewTokens = 256, signal } = {}) {
    const { InterruptableStoppingCriteria, TextStreamer } = this.library;
    const inputs = this.prepare(messages);
    const stopping = new InterruptableStoppingCriteria();
    const stop = () => stopping.interrupt();
    if (signal?.aborted) stop();
    signal?.addEventListener("abort", stop, { once: true });
    const streamer = new TextStreamer(this.tokenizer, { skip_prompt: true, callback_function: onText });
    const output = await this.model.generate({
      ...inputs,
      max_new_tokens: maxNewTokens,
      do_sample: false,
      streamer,
      stopping_criteria: stopping,
    });
    signal?.removeEventListener("abort", stop);
    const promptTokens = inputs.input_ids.dims[1];
    const tokens = output.tolist()[0].slice(promptTokens).map(Number);
    return { text: this.tokenizer.decode(tokens, { skip_special_tokens: true }).trim(), tokens, promptTokens };
  }
}

/** Where the page's import map says that ONNX Runtime's files are; nothing for where transformers.js finds them. */
function runtimeFolder() {
  try {
    return import.meta.resolve("onnxruntime-web/");
  } catch {
    return null;
  }
}
