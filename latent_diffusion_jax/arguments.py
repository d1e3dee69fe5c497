"""The command line: verbs, options, examples, and what each option accepts."""

import argparse
import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from latent_diffusion_jax.errors import UserError

EXAMPLES = {
    "train": """\
examples:
  python -m latent_diffusion_jax train --config=configs/first_stage/shapes.py --workdir=runs/ae
  python -m latent_diffusion_jax train --config=configs/diffusion/shapes.py --workdir=runs/ldm \\
      --config.run.first_stage=runs/ae --config.optim.lr=1e-4
Run the same command again to resume. Ctrl-C and SIGTERM save first.""",
    "encode": """\
example:
  python -m latent_diffusion_jax encode --config=configs/diffusion/shapes.py --workdir=runs/ldm \\
      --config.run.first_stage=runs/ae
Then train with --config.latents.source=cache. --config.latents.variants=4 keeps four cuts of each
image, as data.crop and data.flip say. Run the same command again to go on after a kill.""",
    "sample": """\
examples:
  python -m latent_diffusion_jax sample --workdir=runs/ldm --number=64 --scale=2
  python -m latent_diffusion_jax sample --workdir=runs/ldm --class="red circle,5" --steps=100 \\
      --eta=1 --out=red_circles
  python -m latent_diffusion_jax sample --from=model.ckpt --prompt="a virus monster" \\
      --config.data.tokenizer=DIR --number=4 --out=monsters
  python -m latent_diffusion_jax sample --workdir=runs/fill --image=photo.png --mask=hole.png
  python -m latent_diffusion_jax sample --workdir=runs/ldm --image=photo.png --strength=0.5
  python -m latent_diffusion_jax sample --workdir=runs/ldm --size=512x1024 --window=256 --tile=512
  python -m latent_diffusion_jax sample --workdir=runs/ldm --like=from_the_demo.png
Image i depends on the seed and i alone, whatever the batch size and the number of devices.""",
    "demo": """\
examples:
  python -m latent_diffusion_jax demo --workdir=runs/ldm
  python -m latent_diffusion_jax demo --from=model.ckpt --config.data.tokenizer=DIR --port=8000
Needs: pip install 'latent-diffusion-jax[demo]'. The page is for this machine alone.""",
    "reconstruct": """\
examples:
  python -m latent_diffusion_jax reconstruct --workdir=runs/ae --number=16
  python -m latent_diffusion_jax reconstruct --workdir=runs/ae --input=photos/""",
    "evaluate": """\
examples:
  python -m latent_diffusion_jax evaluate --workdir=runs/shapes64/text --number=200
  python -m latent_diffusion_jax evaluate --workdir=runs/sr --sampler=dpmpp_2m --steps=20
  python -m latent_diffusion_jax evaluate --workdir=runs/ldm --number=50000 --reference=train \\
      --inception=pt_inception-2015-12-05-6726825d.pth
  python -m latent_diffusion_jax evaluate --images=runs/x/samples --reference=photos/ \\
      --inception=pt_inception-2015-12-05-6726825d.pth
  python -m latent_diffusion_jax evaluate --workdir=runs/ae
  python -m latent_diffusion_jax evaluate --compare a.json b.json
On the data `shapes` samples are read back from their pixels; super-resolution and inpainting are
measured on any images. With --inception samples of any model, or images, are compared with others
by FID and its kin. First stages are measured by what they reconstruct. Run the same command again
to go on after a kill.""",
    "convert": """\
examples:
  python -m latent_diffusion_jax convert --from=model.ckpt --workdir=runs/cin256
  python -m latent_diffusion_jax convert --workdir=runs/cin256 --to=model.safetensors
  python -m latent_diffusion_jax convert --workdir=runs/cin256 --to=folder_for_diffusers/
A checkpoint's config is recognised from its keys. Its workdir samples and trains.""",
    "export": """\
examples:
  python -m latent_diffusion_jax export --workdir=runs/ldm --to=red_circles --scale=2
  python -m latent_diffusion_jax export --from=model.ckpt --to=sd --steps=25 --platforms=cuda
  python red_circles/sample.py --number=4 --seed=0 --inputs label=0,5
The folder holds a program (StableHLO, for any batch), its weights, sampler.json, which says what it
takes, and sample.py, which needs jax, flatbuffers, safetensors and pillow but nothing of this
package.""",
    "describe": """\
examples:
  python -m latent_diffusion_jax describe --config=configs/diffusion/shapes.py
  python -m latent_diffusion_jax describe --config=configs/diffusion/shapes.py:tiny --json
  python -m latent_diffusion_jax describe --config=configs/diffusion/imagenet256.py \\
      --config.mesh.fsdp=64 --config.train.batch_size=1280 --devices=256 --kind=v5e""",
    "bench": """\
examples:
  python -m latent_diffusion_jax bench
  python -m latent_diffusion_jax bench --size=S,imagenet256 --what=forward,train_cached --peers
  python -m latent_diffusion_jax bench --config=configs/diffusion/shapes.py --batch=1,16,64 \\
      --dtype=float32,bfloat16 --json=shapes.json
Weights and inputs are random: nothing is needed but the package. Without a --config, size S.""",
}


def checked(read: Callable[[str], Any], accepts: Callable[[Any], bool], what: str) -> Callable:
    """A type for argparse: `read(text)`, refused unless it `accepts` that."""

    def parse(text: str) -> Any:
        with contextlib.suppress(ValueError):
            if accepts(value := read(text)):
                return value
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}")

    return parse


positive = checked(int, lambda n: n >= 1, "a whole number from 1 on")
index = checked(int, lambda n: n >= 0, "a whole number from 0 on")
seconds = checked(float, lambda s: 0 < s < math.inf, "a number of seconds")
seed = checked(int, lambda n: 0 <= n < 2**32, "a whole number from 0 to 2**32 - 1")
finite = checked(float, math.isfinite, "a finite number")
named = checked(str, bool, "a path")
png = checked(str, lambda path: path.lower().endswith(".png"), "a .png file")


def _size(text: str) -> tuple[int, int]:
    height, width = text.lower().split("x")
    return int(height), int(width)


size = checked(_size, lambda s: min(s) >= 1, "HEIGHTxWIDTH, such as 512x768")


def _interval(text: str) -> tuple[float, float]:
    low, high = map(float, text.split(","))
    return low, high


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


interval = checked(_interval, lambda ends: ends[0] < ends[1], "LOW,HIGH, such as 100,800")
share = checked(float, lambda x: 0 < x <= 1, "a number above 0, up to 1")

names = checked(lambda text: text.split(","), all, "a list such as A,B")
numbers = checked(_numbers, lambda found: min(found) >= 1, "a list such as 1,16, from 1 on")


def make_parser(run: Mapping[str, Callable[..., int | None]]) -> argparse.ArgumentParser:
    """The command line without `--config...`, which `split_config` takes off; `run` by verb."""
    top = argparse.ArgumentParser(
        prog="latent_diffusion_jax",
        description="Latent diffusion models in JAX: train, resume and sample both phases.",
        epilog="`VERB --help` shows the options of one verb, with examples.",
    )
    verbs = top.add_subparsers(dest="verb", metavar="VERB", required=True)

    def verb(name, about):
        p = verbs.add_parser(
            name,
            help=about,
            description=about,
            epilog=EXAMPLES[name],
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        p.set_defaults(run=run[name])
        # shown in the help; parsed by `split_config`
        optional = "" if name in ("encode", "describe", "bench") else " (default: the workdir's)"
        p.add_argument(
            "--config", metavar="FILE[:ARG]", help=f"config file and its argument{optional}"
        )
        p.add_argument(
            "--config.KEY", metavar="VALUE", help="override a key, such as --config.optim.lr=1e-4"
        )
        if name not in ("describe", "bench"):
            loads = name in ("sample", "demo", "evaluate", "reconstruct", "export")
            p.add_argument(
                "--workdir",
                required=not loads,
                type=named,
                metavar="DIR",
                help="where the run lives",
            )
            if loads:
                add_from(p, "a checkpoint file or a diffusers folder, instead of a workdir")
        if name not in ("demo", "describe", "convert", "bench", "export"):
            add_processes(p)
        return p

    def add_processes(p):
        about = p.add_argument_group("several processes (default: as the environment says)")
        about.add_argument("--coordinator", metavar="HOST:PORT", help="of process 0")
        about.add_argument("--processes", type=positive, metavar="N", help="how many")
        about.add_argument("--process", type=index, metavar="I", help="which is this, from 0 on")
        for name, default, what in (
            ("wait", 300, "for all to come"),
            ("stall", 60, "without a sign of life of one, then warn"),
            ("lost", 180, "without one, then end the run"),
        ):
            about.add_argument(
                f"--{name}",
                type=seconds,
                default=default,
                metavar="S",
                help=f"seconds {what} (%(default)s)",
            )

    def add_from(p, about):
        p.add_argument("--from", dest="origin", type=named, metavar="PATH", help=about)
        p.add_argument(
            "--weights",
            choices=("ema", "raw"),
            default="ema",
            help="of --from: averaged, where there are some, or as trained (%(default)s)",
        )

    def add_sampling(p):
        about = p.add_argument_group("how (default: the config's)").add_argument
        about("--sampler", metavar="NAME", help="ddim, ddpm, plms, heun, unipc ...")
        about("--steps", type=positive, metavar="N", help="sampling steps")
        about("--timesteps", metavar="NAME", help="which steps: uniform, trailing, karras ...")
        about("--eta", type=finite, metavar="X", help="of ddim: 0 is none, 1 as ddpm's noise")
        about("--scale", type=finite, metavar="X", help="guidance; 1 is none")
        about("--ema_length", type=finite, metavar="X", help="of averages, made of stored ones")
        return about

    def add_extras(about):
        about("--interval", type=interval, metavar="LO,HI", help="guidance at those t alone")
        about("--threshold", type=share, metavar="X", help="dynamic thresholding, such as 0.995")

    verb("train", "Train the phase that the config says, or resume it.")
    verb("encode", "Cache the latents of a data set and measure their scale.")

    p = verb("sample", "Generate images with a trained diffusion model.")
    about = p.add_argument_group("what the model is given, as it takes it").add_argument
    about("--class", metavar="C,C", help="classes, by number or name (all in turn)")
    about("--prompt", metavar="TEXT", help="a caption, or @FILE with one per line")
    about("--layout", metavar="FILE", help="JSON: boxes and their classes")
    about("--segmentation", metavar="FILE", help="an image of class numbers, or a folder")
    about("--image", metavar="FILE", help="to upscale, to fill or to change, or a folder of them")
    about("--mask", metavar="FILE", help="white where --image is to be filled")
    about("--embeddings", metavar="FILE", help=".npy, for retrieval-conditioned models")
    add_extras(add_sampling(p))
    about = p.add_argument_group("any model").add_argument
    about("--strength", type=share, metavar="X", help="of the change of --image (0.75; masks: 1)")
    about("--guide", metavar="FILE", help="an image that samples are to look like, also smaller")
    about("--guide_scale", type=finite, metavar="X", help="how much (%(default)s)", default=0.05)
    about("--interpolate", action="store_true", help="from the seed's image 0 to its image 1")
    about = p.add_argument_group("how many, how large, where").add_argument
    about("--number", type=positive, metavar="N", help="images (16; of images given: all)")
    about("--batch", type=positive, default=32, metavar="N", help="at once (%(default)s)")
    about("--seed", type=seed, default=0, metavar="N", help="(%(default)s)")
    about("--size", type=size, metavar="HxW", help="of the images (as in training)")
    about("--window", type=positive, metavar="N", help="denoise in windows of N pixels")
    about("--tile", type=positive, metavar="N", help="decode in tiles of N pixels")
    about("--out", type=named, metavar="DIR", help="where the PNGs go (WORKDIR/samples)")
    about("--like", type=named, metavar="FILE", help="a PNG of `demo`: its image, made again")

    p = verb("demo", "Show a web page that generates images.")
    p.add_argument("--port", type=positive, default=7860, metavar="N", help="(%(default)s)")

    p = verb("reconstruct", "Encode and decode images, and measure the loss.")
    p.add_argument("--number", type=positive, default=16, metavar="N", help="images (%(default)s)")
    p.add_argument("--batch", type=positive, default=16, metavar="N", help="at once (%(default)s)")
    p.add_argument("--input", type=named, metavar="DIR", help="of images (the validation split)")
    p.add_argument("--out", type=png, metavar="FILE", help="(WORKDIR/reconstructions.png)")

    p = verb("evaluate", "Measure a model, or images that are there.")
    add_sampling(p)
    p.add_argument(
        "--number", type=positive, metavar="N", help="(200; of a first stage: its validation split)"
    )
    p.add_argument("--batch", type=positive, default=32, metavar="N", help="at once (%(default)s)")
    p.add_argument("--seed", type=seed, default=0, metavar="N", help="(%(default)s)")
    p.add_argument("--out", type=named, metavar="FILE", help="(WORKDIR/evaluation.json)")
    about = p.add_argument_group("sets of images, by FID and its kin").add_argument
    about("--inception", type=named, metavar="FILE", help="FID's weights")
    about("--images", type=named, metavar="PATH", help="a folder or .npz, instead of a model")
    about(
        "--reference",
        type=named,
        metavar="PATH",
        help="the same, or .npz statistics (mu, sigma); train, validation: the model's own data",
    )
    about("--preparation", default="torch-fidelity", metavar="NAME", help="or pytorch-fid")
    about("--save_statistics", type=named, metavar="FILE", help="of the images, as a reference")
    about("--neighbours", type=positive, metavar="N", help="of N images, in the reference: copies?")
    about = p.add_argument_group("more").add_argument
    about("--lpips", type=named, metavar="FILE[,FILE]", help="its weights, of a first stage")
    about("--clip", type=named, metavar="DIR", help="of transformers, for a score of captions")
    about("--compare", nargs="+", metavar="FILE", help="print results side by side")
    about("--json", action="store_true", help="print the result's file, for programs")

    p = verb("convert", "Bring a published checkpoint in, or write one.")
    add_from(p, "a checkpoint file or a diffusers folder to bring in")
    p.add_argument("--to", type=named, metavar="PATH", help=".safetensors, .ckpt or a new folder")
    p.add_argument("--dtype", metavar="NAME", help="of --to, such as float16 (the original's)")

    p = verb("export", "Write a sampler that runs without this package.")
    add_extras(add_sampling(p))
    p.add_argument("--size", type=size, metavar="HxW", help="of the images (as in training)")
    p.add_argument("--window", type=positive, metavar="N", help="denoise in windows of N pixels")
    p.add_argument("--to", type=named, required=True, metavar="DIR", help="a new folder")
    p.add_argument(
        "--platforms",
        default="cpu,cuda,tpu",
        metavar="P,P",
        help="that it is to run on (%(default)s)",
    )

    p = verb("describe", "Say what would be built, without building it.")
    p.add_argument("--json", action="store_true", help="for programs")
    p.add_argument("--arrays", action="store_true", help="list every trained array instead")
    about = p.add_argument_group("will it fit").add_argument
    about("--devices", type=positive, metavar="N", help="plan a training step for so many")
    about("--kind", metavar="NAME", help="and say how fast: v4, v5e, v5p, v6e, a100, h100, h200")
    about("--compile", action="store_true", help="and compile it for as many CPUs (minutes)")

    p = verb("bench", "Measure speed and memory on this machine.")
    about = p.add_argument_group("what (lists: A,B; each combination is a row)").add_argument
    about("--size", type=names, metavar="NAMES", help="S, imagenet256, text256, sd1")
    about("--what", type=names, metavar="NAMES", help="forward, train_cached, sample ... (all)")
    about("--batch", type=numbers, metavar="N,N", help="images at once (16; sample: 4)")
    about("--dtype", type=names, default=["float32"], metavar="NAMES", help="(float32)")
    about("--turns", type=positive, default=5, metavar="N", help="of each (%(default)s)")
    about(
        "--peers",
        type=names,
        nargs="?",
        default=[],
        const=["eager", "compile"],
        metavar="NAMES",
        help="the same in PyTorch: eager, compile, eager_nhwc, compile_nhwc (the first two)",
    )
    about("--json", type=named, metavar="FILE", help="where all that was found goes")
    return top


def split_config(argv: Sequence[str]) -> tuple[list[str], str | None, list[str]]:
    """Parts `argv` into the rest, the value of --config and the --config.key=value overrides."""
    rest, spec, overrides = [], None, []
    words = iter(argv)
    for word in words:
        name, equals, value = word.partition("=")
        if name != "--config" and not name.startswith("--config."):
            rest.append(word)
            continue
        if not equals:
            value = next(words, "")
            if not value:
                raise UserError(f"{name} has no value; write {name}=VALUE")
        if name == "--config":
            spec = value
        else:
            overrides.append(f"{name}={value}")
    return rest, spec, overrides
