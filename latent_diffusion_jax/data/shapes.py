"""The embedded data set: coloured circles, squares and triangles, drawn from a seed and an index.

Every task can be trained and measured on it without a download: an example has an image, a class
label, a caption, bounding boxes and a segmentation map, and all of them are exact.
"""

import functools
import hashlib
import math
import operator
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from latent_diffusion_jax.errors import UserError, choose

KINDS = ("circle", "square", "triangle")
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 165, 60),
    "blue": (45, 80, 220),
    "yellow": (240, 210, 40),
}
CLASS_NAMES = tuple(f"{colour} {kind}" for kind in KINDS for colour in COLOURS)
BACKGROUNDS = {"dark": (20, 70), "light": (185, 235)}  # the range of their grey
MAX_SHAPES = 3
VALIDATION = 2_000  # examples at most: more would be encoded, and seen by nobody

SPLITS = {"train": 0, "validation": 1}
SIDES = {"square": 4, "triangle": 3}
MARGIN = 0.02  # of the image, between a shape and the border
MAX_TURN = math.radians(15)


class Shape(NamedTuple):
    """One shape; lengths are fractions of the image side, y points down."""

    kind: str
    colour: str
    rgb: np.ndarray  # float32 [3], 0..255
    x: float
    y: float
    size: float  # the square root of the area, so that equal sizes cover equal areas
    turn: float  # radians

    @property
    def label(self) -> int:
        """The index in CLASS_NAMES."""
        return KINDS.index(self.kind) * len(COLOURS) + list(COLOURS).index(self.colour)

    @property
    def radius(self) -> float:
        """The radius of the circle around the shape."""
        if self.kind == "circle":
            return self.size / math.sqrt(math.pi)
        n = SIDES[self.kind]
        return self.size * math.sqrt(2 / (n * math.sin(2 * math.pi / n)))

    def directions(self, half_steps: int) -> list[tuple[float, float]]:
        """A polygon's unit vectors from the centre: to edges (0) or corners (1), bottom first."""
        n = SIDES[self.kind]
        angles = [math.pi * (0.5 + (2 * k + half_steps) / n) + self.turn for k in range(n)]
        return [(math.cos(angle), math.sin(angle)) for angle in angles]

    @property
    def box(self) -> tuple[float, float, float, float]:
        """The bounding box (x0, y0, x1, y1) of the whole shape, hidden parts included."""
        if self.kind == "circle":
            west, north, east, south = -1.0, -1.0, 1.0, 1.0
        else:
            xs, ys = zip(*self.directions(1))
            west, north, east, south = min(xs), min(ys), max(xs), max(ys)
        x, y, r = self.x, self.y, self.radius
        return x + r * west, y + r * north, x + r * east, y + r * south

    def coverage(self, image_size: int) -> np.ndarray:
        """How much of each pixel is covered, float32 [H, W] in 0..1, from the signed distance."""
        centres = (np.arange(image_size, dtype=np.float32) + 0.5) / image_size
        dx, dy = centres[None, :] - self.x, centres[:, None] - self.y
        if self.kind == "circle":
            distance = np.sqrt(dx * dx + dy * dy) - self.radius
        else:
            apothem = self.radius * math.cos(math.pi / SIDES[self.kind])
            edges = [nx * dx + ny * dy for nx, ny in self.directions(0)]
            distance = functools.reduce(np.maximum, edges) - apothem
        return np.clip(0.5 - distance * image_size, 0, 1)


class Shapes:
    """Random access to procedural examples; an index, a seed and the split make all of one.

    An example holds `image` uint8 [H, W, 3], `label` int32 (the class of the largest shape),
    `caption` str, `boxes` float32 [3, 4] (x0, y0, x1, y1 in 0..1, largest shape first, padded with
    zeros), `box_labels` int32 [3] (padded with -1) and `segmentation` uint8 [H, W] (what is
    visible: 0 background, else 1 + class).

    Args:
      split: "train" or "validation".
      image_size: the side in pixels, 32 to 256; the scene does not depend on it.
      size: the number of examples; of the validation split VALIDATION at most.
      seed: of all of them, 0 to 2**64 - 1.
      shapes: the least and the most shapes of one image, 1 to 3.
      held_out: the share of all captions that never occur in training; where it is above 0, no
        other captions occur in validation. From 0 to below 1.
      backgrounds: of BACKGROUNDS, as often each. With both, most of an image's variance is which.

    Raises:
      UserError: an unknown split or background, or a number out of range.
    """

    class_names = CLASS_NAMES
    num_classes = len(CLASS_NAMES)

    def __init__(
        self,
        *,
        split: Literal["train", "validation"],
        image_size: int = 32,
        size: int = 50_000,
        seed: int = 0,
        shapes: tuple[int, int] = (1, 1),
        held_out: float = 0.0,
        backgrounds: Sequence[str] = tuple(BACKGROUNDS),
    ):
        choose("split", split, SPLITS)
        fewest, most = shapes
        if not 32 <= image_size <= 256:
            raise UserError(f"shapes image_size {image_size} must be 32 to 256")
        if size < 1:
            raise UserError(f"shapes size {size} must be at least 1")
        if not 0 <= seed < 2**64:
            raise UserError(f"shapes seed {seed} must be 0 to 2**64 - 1")
        if not 1 <= fewest <= most <= MAX_SHAPES:
            raise UserError(f"shapes {tuple(shapes)} must be (min, max) within 1 to {MAX_SHAPES}")
        if not 0 <= held_out < 1:
            raise UserError(f"shapes held_out {held_out} must be from 0 to below 1")
        if not backgrounds:
            raise UserError(f"shapes backgrounds () must name some of {', '.join(BACKGROUNDS)}")
        self.greys = [choose("shapes background", name, BACKGROUNDS) for name in backgrounds]
        self.split, self.image_size, self.seed = split, image_size, seed
        self.size = size if split == "train" else min(size, VALIDATION)
        self.held_out = held_out
        self.fewest, self.most = fewest, most

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict:
        index = operator.index(index)
        if not 0 <= index < self.size:
            raise IndexError(f"index {index} of {self.size} shapes")
        # The split is in the key and the index in the counter: two streams never meet.
        philox = np.random.Philox(key=[self.seed, SPLITS[self.split]], counter=[0, 0, 0, index])
        generator = np.random.Generator(philox)
        shade = generator.uniform(*self.greys[int(generator.random() * len(self.greys))])
        while True:
            shapes = draw_shapes(generator, int(generator.integers(self.fewest, self.most + 1)))
            if self._belongs(describe(shapes)):
                break
        image, segmentation = render(shapes, shade, self.image_size)
        boxes = np.zeros((MAX_SHAPES, 4), np.float32)
        boxes[: len(shapes)] = [shape.box for shape in shapes]
        labels = np.full(MAX_SHAPES, -1, np.int32)
        labels[: len(shapes)] = [shape.label for shape in shapes]
        return {
            "image": image,
            "label": labels[0],
            "caption": describe(shapes),
            "boxes": boxes,
            "box_labels": labels,
            "segmentation": segmentation,
        }

    def _belongs(self, caption: str) -> bool:
        """Whether a caption may occur in this split: a hash of it decides."""
        if not self.held_out:
            return True
        digest = hashlib.sha256(caption.encode()).digest()
        unseen = int.from_bytes(digest[:6], "big") / 2**48 < self.held_out
        return unseen == (self.split == "validation")


def draw_shapes(generator: np.random.Generator, count: int) -> list[Shape]:
    """Draws `count` shapes inside the image, largest first, that overlap at most a little."""
    if count == 1:
        return [draw_shape(generator, 0.40, 0.56)]
    shapes = [draw_shape(generator, 0.28, 0.36)]
    shrink = 1.0
    while len(shapes) < count:
        shape = draw_shape(generator, 0.19 * shrink, 0.25 * shrink)
        if any(overlap(shape, other) for other in shapes):
            shrink *= (
                0.99  # where it is crowded the next one is a little smaller, so that this ends
            )
        else:
            shapes.append(shape)
    return shapes


def draw_shape(generator: np.random.Generator, low: float, high: float) -> Shape:
    """Draws one shape of a size in low..high; the place keeps its whole box inside the image."""
    kind = KINDS[generator.integers(len(KINDS))]
    colour = list(COLOURS)[generator.integers(len(COLOURS))]
    rgb = np.clip(COLOURS[colour] + generator.uniform(-15, 15, 3), 0, 255).astype(np.float32)
    size, turn = generator.uniform(low, high), generator.uniform(-MAX_TURN, MAX_TURN)
    shape = Shape(kind, colour, rgb, 0.0, 0.0, size, turn)
    x0, y0, x1, y1 = shape.box
    return shape._replace(
        x=generator.uniform(MARGIN - x0, 1 - MARGIN - x1),
        y=generator.uniform(MARGIN - y0, 1 - MARGIN - y1),
    )


def overlap(a: Shape, b: Shape) -> bool:
    """Whether two shapes come closer than 0.9 of the sum of the circles around them."""
    return math.hypot(a.x - b.x, a.y - b.y) < 0.9 * (a.radius + b.radius)


def render(shapes: list[Shape], shade: float, image_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Paints shapes in order over a grey background: image uint8 [H, W, 3], segmentation [H, W]."""
    image = np.full((image_size, image_size, 3), shade, np.float32)
    segmentation = np.zeros((image_size, image_size), np.uint8)
    for shape in shapes:
        alpha = shape.coverage(image_size)
        image += alpha[..., None] * (shape.rgb - image)
        segmentation[alpha >= 0.5] = 1 + shape.label
    return np.rint(image).astype(np.uint8), segmentation


def describe(shapes: list[Shape]) -> str:
    """`a red circle left of a blue square and above a green triangle`, from the centres."""
    main, *others = shapes
    places = [f"{place(main, other)} a {CLASS_NAMES[other.label]}" for other in others]
    return " ".join([f"a {CLASS_NAMES[main.label]}", " and ".join(places)]).strip()


def place(a: Shape, b: Shape) -> str:
    """Where `a` lies as seen from `b`, along the axis on which they differ most."""
    dx, dy = a.x - b.x, a.y - b.y
    if abs(dx) >= abs(dy):
        return "left of" if dx < 0 else "right of"
    return "above" if dy < 0 else "below"
