"""The one door: `python -m latent_diffusion_jax VERB --config=FILE[:arg] --workdir=DIR`.

Verbs are a few lines each and import what they need, so that `--help` and mistakes answer at once.
"""

import contextlib
import functools
import json
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from latent_diffusion_jax import xla
from latent_diffusion_jax.arguments import make_parser, split_config
from latent_diffusion_jax.errors import UserError, differences

FREE = ("data", "dtype", "mesh", "published", "run", "sample")  # what using a model may change
CURVES = {
    "first_stage": ("loss", "validation_psnr", "validation_ssim", "z_std"),
    "diffusion": ("loss", "loss_t0", "validation_loss", "images_per_second"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line; returns the exit code: 2 for a mistake of the user's."""
    try:
        rest, spec, overrides = split_config(sys.argv[1:] if argv is None else argv)
        args = make_parser(VERBS).parse_args(rest)
        args.config, args.overrides = spec, overrides
        _set_up_jax()
        args.channel = _join(args)
        if args.channel is not None:
            return _run_with_others(args)
        return args.run(args) or 0
    except (UserError, OSError) as error:  # OSErrors name the path: not there, full, read-only
        print(_line(error), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _line(error: BaseException) -> str:
    return f"error: {' '.join(str(error).split())}"


def _join(args):
    """The channel to the other processes of this run, if there are any."""
    from latent_diffusion_jax.cluster import join

    if "coordinator" not in args:  # a verb of one process
        return None
    return join(
        coordinator=args.coordinator,
        processes=args.processes,
        process=args.process,
        wait=args.wait,
        stall=args.stall,
        lost=args.lost,
    )


def _run_with_others(args) -> int:
    """Runs a verb as one of several processes: one speaks, and none outlives another's failure."""
    channel = args.channel
    try:
        with contextlib.ExitStack() as stack:
            if channel.place.process:  # errors and warnings still have stderr
                nowhere = stack.enter_context(Path(os.devnull).open("w"))
                stack.enter_context(contextlib.redirect_stdout(nowhere))
            code = args.run(args) or 0
    except (UserError, OSError) as error:
        channel.fail(_line(error), 2)
    except KeyboardInterrupt:
        channel.fail("error: interrupted", 130)
    except Exception as error:
        channel.blame()  # a collective that breaks since another process ended is no fault here
        traceback.print_exc()
        channel.fail(f"error: {type(error).__name__}: {_line(error)[:300]}", 1)
    channel.close()
    return code


def _set_up_jax() -> None:
    import absl.logging
    import jax

    # Orbax warns of what was asked for, and shows pages of an error that we say in a line.
    absl.logging.set_verbosity(absl.logging.FATAL)
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        jax.config.update("jax_compilation_cache_dir", f"{home}/latent_diffusion_jax")
    if not os.environ.get("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
        # by default what compiles within a second is not kept: at every start dozens of these
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    xla.tune()


def _config(args, required: bool = False):
    """The config that a command names, or else its workdir's."""
    from etils import epath

    from latent_diffusion_jax.config import load_config, override, stored_config

    if args.config is not None:
        return load_config(args.config, args.overrides)
    if required and not (epath.Path(args.workdir or "") / "config.json").exists():
        raise UserError("give --config=FILE, such as --config=configs/diffusion/shapes.py")
    return override(stored_config(args.workdir), args.overrides)


def _mesh(config):
    from latent_diffusion_jax import build
    from latent_diffusion_jax.train.sharding import make_mesh

    mesh = build.unpack("mesh", make_mesh, config.mesh)
    build.check_batch(config, mesh.size)
    if config.run.steps < 1:
        raise UserError(f"run.steps {config.run.steps} must be at least 1")
    return mesh


def train(args) -> int:
    """Trains or resumes; exit code 0, or 130 after Ctrl-C."""
    if args.channel is None:  # of several processes, JAX notes the signal for the loop
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # nothing to save yet
    import jax

    from latent_diffusion_jax.config import to_json
    from latent_diffusion_jax.phases import make_phase
    from latent_diffusion_jax.train import averages, loop
    from latent_diffusion_jax.train.checkpoint import Checkpointer, check_config, write_config
    from latent_diffusion_jax.train.metrics import Writer, plot_curves
    from latent_diffusion_jax.train.trace import Trace

    config = _config(args, required=True)
    check_config(args.workdir, to_json(config))
    mesh = _mesh(config)
    phase = make_phase(config, args.workdir, mesh)
    run = config.run
    trace = Trace(f"{args.workdir}/profile", run.get("profile", (0, 0)))
    lengths = config.train.get("ema_lengths", ())
    with contextlib.ExitStack() as stack:
        checkpointer = Checkpointer(args.workdir, keep=run.keep)
        stack.enter_context(contextlib.closing(checkpointer))
        snapshot = None
        if lengths:
            stored = Checkpointer(averages.folder(args.workdir), keep=None)
            stack.enter_context(contextlib.closing(stored))
            snapshot = functools.partial(averages.write, stored, lengths=lengths)
        write_config(args.workdir, to_json(config))
        try:
            state = loop.train(
                **phase._asdict(),
                mesh=mesh,
                checkpointer=checkpointer,
                writer=Writer(args.workdir),
                key=jax.random.key(config.seed),
                steps=run.steps,
                log_every=run.log_every,
                eval_every=run.eval_every,
                image_every=run.image_every,
                checkpoint_every=run.checkpoint_every,
                snapshot_every=run.get("snapshot_every", 0),
                snapshot=snapshot,
                accumulate=config.train.accumulate,
                max_skipped=run.max_skipped,
                trace=trace,
                **({} if args.channel is None else {"report": args.channel.at}),
            )
        except loop.Stopped as stopped:
            print(stopped, flush=True)
            return stopped.exit_code
    curves = f"{args.workdir}/curves.png"
    if jax.process_index() == 0:
        plot_curves(f"{args.workdir}/metrics.jsonl", curves, CURVES[config.phase])
    print(f"trained to step {state.step}: {args.workdir}, curves in {curves}")
    return 0


def encode(args) -> None:
    """Writes `<workdir>/latents` and the latent scale."""
    from latent_diffusion_jax.encode import encode

    config = _config(args, required=True)
    if config.phase != "diffusion":
        raise UserError(f"encode takes a config of phase 'diffusion', not {config.phase!r}")
    scale = encode(config, args.workdir, _mesh(config))
    print(f"latents in {args.workdir}/latents, latent scale {scale:.4f}")


def _trained(args, phase: str | None = None, ema_length: float | None = None):
    from latent_diffusion_jax import pipeline

    if (args.workdir is None) == (args.origin is None):
        raise UserError("give one of --workdir=DIR and --from=CHECKPOINT")
    if args.origin and ema_length is not None:
        raise UserError("--ema_length is of a --workdir that stored averages, not of --from")
    if args.origin:
        trained, mesh = _from_checkpoint(args, phase)
    else:
        trained, mesh = _from_workdir(args, phase, ema_length)
    return pipeline.in_compute_dtype(trained), mesh


def _from_workdir(args, phase: str | None, ema_length: float | None):
    from latent_diffusion_jax import build, pipeline
    from latent_diffusion_jax.config import stored_config
    from latent_diffusion_jax.train.sharding import make_mesh

    config = _config(args)
    here, there = (
        {name: section for name, section in each.to_dict().items() if name not in FREE}
        for each in (config, stored_config(args.workdir))
    )
    differing = differences(here, there, "in the workdir")
    if differing:
        raise UserError(f"{args.workdir} holds another config; {'; '.join(differing)}")
    if phase and config.phase != phase:
        raise UserError(f"{args.workdir!r} holds phase {config.phase!r}; this takes {phase!r}")
    mesh = build.unpack("mesh", make_mesh, config.mesh)
    return pipeline.load(args.workdir, mesh, ema_length)._replace(config=config), mesh


def _from_checkpoint(args, phase: str | None):
    from latent_diffusion_jax import build
    from latent_diffusion_jax.convert.workdir import load_trained, open_source
    from latent_diffusion_jax.train.sharding import make_mesh

    source = open_source(args.origin, args.config, args.overrides)
    if phase and source.config.phase != phase:
        raise UserError(
            f"{args.origin!r} is of phase {source.config.phase!r}; this takes {phase!r}"
        )
    mesh = build.unpack("mesh", make_mesh, source.config.mesh)
    return load_trained(source, mesh, raw=args.weights == "raw"), mesh


def convert(args) -> None:
    """Brings a checkpoint in (`--from`), or writes one (`--to`)."""
    from latent_diffusion_jax.convert import workdir
    from latent_diffusion_jax.train.sharding import make_mesh

    if (args.origin is None) == (args.to is None):
        raise UserError("give one of --from=CHECKPOINT (to bring in) and --to=PATH (to write)")
    if args.to:
        workdir.export(args.workdir, args.to, make_mesh(), dtype=args.dtype)
        print(f"{args.workdir} written to {args.to}")
        return
    source = workdir.open_source(args.origin, args.config, args.overrides)
    workdir.import_workdir(source, args.workdir, make_mesh(), raw=args.weights == "raw")
    print(f"{args.origin} in {args.workdir}: sample from it, or train on it")


def sample(args) -> None:
    """Writes PNGs, a grid of them, and `samples.json` with what was asked for."""
    import numpy as np

    from latent_diffusion_jax import pipeline, sampling
    from latent_diffusion_jax.inputs import OPTIONS, read_inputs

    if args.like is not None:
        _sample_again(args)
        return
    trained, mesh = _trained(args, "diffusion", args.ema_length)
    options = _sampling(args, trained.config)
    wanted = {option: getattr(args, option) for option in OPTIONS}
    given = read_inputs(trained.config, wanted, trained.class_names)
    if args.size and given.size and args.size != given.size:
        asked_for, made = (f"{height}x{width}" for height, width in (args.size, given.size))
        raise UserError(f"--size={asked_for}: the image given makes {made}")
    if args.strength is not None and "start" not in given.inputs:
        raise UserError(f"--strength={args.strength} is of the change of an --image")
    number = args.number or (len(given.names) if given.names else 16)
    indices = np.arange(number)
    inputs = {name: rows[indices % len(rows)] for name, rows in given.inputs.items()}
    if args.interpolate:
        inputs["between"] = np.linspace(0, 1, number, dtype=np.float32)
    extras = {name: getattr(args, name) for name in sampling.Extras._fields}
    batches = sampling.generate(
        trained,
        mesh,
        inputs=inputs,
        number=number,
        batch=args.batch,
        seed=args.seed,
        size=args.size or given.size,
        extras=sampling.Extras(**extras),
        **options,
    )
    out = Path(args.out or Path(args.workdir or ".") / "samples")
    asked = {
        **{option: text for option, text in wanted.items() if text is not None},
        "step": trained.step,
        "seed": args.seed,
        **_length(args),
        **options,
        "options": dict(options["options"]),
        **{name: value for name, value in extras.items() if value is not None},
    }
    names = given.names and [given.names[i % len(given.names)] for i in indices]
    about = given.about and [given.about[i % len(given.about)] for i in indices]
    grid = pipeline.write_samples(out, batches, number, about, asked, names)
    print(f"{number} images in {out}, side by side in {grid}")


def _sample_again(args) -> None:
    """Writes the image of a PNG that says how it was made."""
    import numpy as np

    from latent_diffusion_jax.demo.denoising import Denoiser
    from latent_diffusion_jax.demo.settings import fingerprint, read_given, read_png, write_png

    allowed = {"like", "workdir", "origin", "weights", "out", "config", "overrides", "channel"}
    plain = vars(make_parser(VERBS).parse_args(["sample"]))
    for name in sorted(plain.keys() - allowed):
        if getattr(args, name) != plain[name]:
            raise UserError(f"--{name} and --like: that PNG says all but --workdir and --out")
    settings, index, model = read_png(args.like)
    trained, mesh = _trained(args, "diffusion")
    if model != (here := fingerprint(trained)):
        raise UserError(f"{args.like!r} was made by another model: {model} there, {here} here")
    given = read_given(settings, trained)
    *_, last = Denoiser(trained, mesh).run(settings, given)
    out = Path(args.out or Path(args.workdir or ".") / "samples")
    out.mkdir(parents=True, exist_ok=True)
    path = out / Path(args.like).name
    if path.resolve() == Path(args.like).resolve():
        raise UserError(f"{str(path)!r} would be written over: choose another --out")
    path.write_bytes(write_png(np.asarray(last.images)[index], index, settings, model))
    print(f"{args.like} made again: {path}")


def demo(args) -> None:
    """Shows a web page until Ctrl-C."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        line = f"the page needs gradio ({error}): pip install 'latent-diffusion-jax[demo]'"
        raise UserError(line) from error
    from latent_diffusion_jax.demo.denoising import Denoiser
    from latent_diffusion_jax.demo.page import serve
    from latent_diffusion_jax.demo.queue import Queue

    trained, mesh = _trained(args, "diffusion")
    serve(Queue(Denoiser(trained, mesh)), args.port, args.workdir or args.origin)


def evaluate(args) -> None:
    """Prints measures, and writes them with their protocol, beside a picture."""
    from latent_diffusion_jax.evaluate import results

    if args.compare is not None:
        if args.json:
            raise UserError("--json is of one result; --compare prints a table")
        print(results.table(args.compare))
        return
    with contextlib.redirect_stdout(sys.stderr if args.json else sys.stdout):  # progress
        out, said = _evaluated(args)
    if said:
        print(out.read_text() if args.json else said)


def _evaluated(args) -> tuple[Path, str]:
    """Where the result of what is asked for was written, and its table ("" in other processes)."""
    from latent_diffusion_jax.evaluate import measure

    if args.images is not None:
        if args.workdir or args.origin:
            raise UserError("give one of --images (of any model) and --workdir or --from")
        asked = _features(args, f"{args.images.rstrip('/')}.evaluation")
        return asked.out, measure.images(args.images, asked)
    trained, mesh = _trained(args, None, args.ema_length)
    about = {"of": args.workdir or args.origin, "step": trained.step}
    here = Path(args.workdir or ".")
    if trained.config.phase == "first_stage":
        _refuse(args, ("sampler", "steps", "timesteps", "eta", "scale", "clip"), "is of samples")
        asked = _features(args, here / "evaluation")
        lpips = _lpips(args)
        return asked.out, measure.first_stage(trained, mesh, about, asked, args.workdir, lpips)
    _refuse(args, ("lpips",), "is of a first stage's reconstructions")
    average = "ema" if args.ema_length is None else f"ema of length {args.ema_length:g}"
    about["weights"] = average if args.workdir else args.weights
    options = {**_sampling(args, trained.config), "seed": args.seed}
    if args.inception is not None:
        _refuse(args, ("clip",), "goes without --inception")
        asked = _features(args, here / "samples.evaluation")
        return asked.out, measure.samples(trained, mesh, about, asked, options)
    comparing = ("reference", "save_statistics", "neighbours")
    _refuse(args, comparing, "takes --inception=FILE, FID's weights")
    out, number = Path(args.out or here / "evaluation.json"), args.number or measure.EXAMPLES
    captions = _clip_score(args), args.clip
    return out, measure.task(trained, mesh, about, out, number, args.batch, options, *captions)


def _refuse(args, names: Sequence[str], why: str) -> None:
    """Raises UserError if one of these options was given."""
    for name in names:
        if getattr(args, name) is not None:
            raise UserError(f"--{name}={getattr(args, name)} {why}")


def _features(args, place):
    """What of images' features is asked for; by default the result lies at `place`.json."""
    from latent_diffusion_jax.convert.inception import load_inception
    from latent_diffusion_jax.evaluate.measure import Asked

    fields = {name: getattr(args, name) for name in Asked._fields if name != "out"}
    if args.inception is not None:
        fields["inception"] = load_inception(args.inception)
    return Asked(**fields, out=Path(args.out or f"{place}.json"))


def _clip_score(args):
    from latent_diffusion_jax.convert.clip import load_clip
    from latent_diffusion_jax.evaluate.clip import make_clip_score

    return None if args.clip is None else make_clip_score(*load_clip(args.clip))


def _lpips(args):
    from latent_diffusion_jax.convert.lpips import load_lpips

    return None if args.lpips is None else load_lpips(args.lpips.split(","))


def _sampling(args, config) -> dict[str, Any]:
    """Section `sample` of the config with what the command line changes."""
    options = dict(config.sample)
    for name in ("scale", "steps", "timesteps"):
        if getattr(args, name) is not None:
            options[name] = getattr(args, name)
    if args.sampler not in (None, options["sampler"]):
        options |= {"sampler": args.sampler, "options": {}}
    if args.eta is not None:
        options["options"] = {"eta": args.eta}
    return options


def _length(args) -> dict[str, float]:
    return {} if args.ema_length is None else {"ema_length": args.ema_length}


def reconstruct(args) -> None:
    """Writes originals above reconstructions, and prints how alike they are."""
    from latent_diffusion_jax import pipeline

    trained, mesh = _trained(args)
    out = Path(args.out or Path(args.workdir or ".") / "reconstructions.png")
    quality = pipeline.write_reconstructions(
        trained, mesh, out, args.number, args.batch, args.input
    )
    ssim = f", SSIM {quality['ssim']:.4f}" if "ssim" in quality else ""
    print(f"{out}: PSNR {quality['psnr']:.2f} dB{ssim}, L1 {quality['l1']:.4f} (images in [-1, 1])")


def export(args) -> None:
    """Writes a folder that samples without this package."""
    from latent_diffusion_jax import sampling
    from latent_diffusion_jax.export import export

    trained, _ = _trained(args, "diffusion", args.ema_length)
    extras = {n: getattr(args, n) for n in ("interval", "threshold", "window")}
    export(
        trained,
        Path(args.to),
        platforms=args.platforms.split(","),
        size=args.size,
        extras=sampling.Extras(**extras),
        **_sampling(args, trained.config),
    )
    print(f"{args.to}: `python {Path(args.to) / 'sample.py'} --help`, with jax alone")


def describe(args) -> None:
    """Prints a table, or JSON."""
    from latent_diffusion_jax.describe import arrays, describe, table

    config = _config(args, required=True)
    if args.arrays:
        print(arrays(config))
        return
    if args.compile:
        _fake_devices(args.devices)
    facts = describe(config, args.devices, args.kind)
    if args.compile:
        from latent_diffusion_jax.compiled import measure

        facts["compiled"] = measure(config, _mesh(config))
    print(json.dumps(facts, indent=2) if args.json else table(facts))


def bench(args) -> None:
    """Prints a table in Markdown, row by row, and writes JSON."""
    from latent_diffusion_jax.bench import report, turns

    own = None if args.config is None else (Path(args.config).stem, _config(args))
    sizes = args.size or ([] if own else ["S"])
    rows = turns.rows(sizes, args.what or (), args.batch, args.dtype, own)
    report.report(rows, args.turns, turns.check_peers(args.peers), args.json)


def _fake_devices(number: int | None) -> None:
    import jax

    if number is None:
        raise UserError("--compile needs --devices=N: for how many to compile")
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", number)


VERBS = {
    verb.__name__: verb
    for verb in (
        *(train, encode, sample, demo, evaluate, reconstruct),
        *(convert, export, describe, bench),
    )
}


def command() -> None:
    """The process of a command line: it ends when `main` does."""
    code = main()
    if code:  # Orbax leaves threads that wait ten minutes for a save which failed
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    command()
