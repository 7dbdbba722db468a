"""The rows of tools/verify_gpu.py. Each function yields its checks as they come, in a process of its own."""
import math
import os
import re
import signal
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, Callable

from system import sizes
from tools import cli
from tools.gpu_runs import (
    CONFIG,
    FAILED,
    PASSED,
    QUICK,
    Check,
    Machine,
    apart,
    at_most,
    equal,
    finish,
    left_open,
    losses,
    make_images,
    needs_gpu,
    noted,
    options,
    pairs,
    run,
    start,
    weights_apart,
)

LARGE = os.path.join(cli.ROOT, 'configs', 'halonet_26t_256.yaml')
WITH_LAMBDA = os.path.join(cli.ROOT, 'configs', 'lamhalobotnet_50ts_256.yaml')
RECIPE = ['TRAIN.MIXUP_ALPHA', 0.2, 'TRAIN.CUTMIX_ALPHA', 1.0, 'TRAIN.RANDOM_ERASE_PROB', 0.5,
          'TRAIN.EMA_DECAY', 0.9, 'TRAIN.GRAD_CLIP', 1.0, 'TRAIN.ACCUM_ITER', 2, 'DATA.BATCH_SIZE', 8]
FLOAT32, TF32 = 1e-4, 5e-3                          # of the standard deviation of the logits
HALF = {'float16': (2e-2, 0.95), 'bfloat16': (1e-1, 0.9)}    # rms of the logits, cosine of the gradients


def machine_facts(machine: Machine) -> Iterator[Check]:
    """Show the versions that matter, and that they go together."""
    import paddle

    from training import records
    for name, value in records.machine(machine.device).items():
        if name not in ('command', 'folder'):
            yield noted(name, value)
    installed = []
    for package in ('paddlepaddle', 'paddlepaddle-gpu'):
        try:
            installed.append(f'{package} {metadata.version(package)}')
        except metadata.PackageNotFoundError:
            pass
    yield equal('packages of Paddle', len(installed), 1)
    free = os.statvfs('/dev/shm')
    megabytes = free.f_bavail * free.f_frsize >> 20
    yield Check('/dev/shm', 'at least 1024 MB', f'{megabytes} MB', PASSED if megabytes >= 1024 else FAILED)
    if machine.device != 'gpu':
        yield needs_gpu('compute capability, NCCL')
        return
    yield noted('compute capability', '.'.join(map(str, paddle.device.cuda.get_device_capability())))
    yield noted('NCCL', paddle.version.nccl())
    yield noted('GPUs', machine.gpus)


def forward(machine: Machine) -> Iterator[Check]:
    """Compare the logits of every model on the GPU with those on the CPU."""
    if machine.device != 'gpu':
        yield needs_gpu('logits of every model against those of the CPU')
        return
    limit = FLOAT32 if os.environ.get('NVIDIA_TF32_OVERRIDE') == '0' else TF32
    for config in published():
        on_gpu, on_cpu = (logits_of(config, device) for device in ('gpu', 'cpu'))
        yield at_most(Path(config).stem, float(abs(on_gpu - on_cpu).max() / on_cpu.std()), limit)


def published() -> list[str]:
    """Return the config files of all models."""
    return sorted(str(path) for path in Path(cli.ROOT, 'configs').glob('[!_]*.yaml'))


def logits_of(config: str, device: str) -> Any:
    """Return the logits of a model with fresh weights for two fixed images, as an array."""
    import paddle
    pair = build(config, device)
    with paddle.no_grad():
        return forward_of(pair).numpy()


def build(config: str, device: str) -> Any:
    """Return a pair: a model with the same fresh weights on every device, in evaluation, and two images."""
    import numpy as np
    import paddle

    from config import get_config
    from halonet import build_halonet
    paddle.set_device('cpu')                        # its random numbers
    paddle.seed(0)
    settings = get_config(config)
    state = {key: value.numpy() for key, value in build_halonet(settings).state_dict().items()}
    paddle.set_device(device)
    model = build_halonet(settings)
    model.set_state_dict(state)
    model.eval()
    shape = 2, settings.DATA.CHANNELS, *sizes.sides(settings.DATA.IMAGE_SIZE)
    images = np.random.default_rng(0).standard_normal(shape, dtype='float32')
    return model, paddle.to_tensor(images)


def forward_of(pair: Any, dtype: str = '') -> Any:
    """Return the logits of a pair of `build` as a float32 tensor."""
    from training.mixed_precision import make_autocast
    model, images = pair
    with make_autocast(dtype)():
        return model(images).astype('float32')


def mixed_precision(machine: Machine) -> Iterator[Check]:
    """Compare mixed precision with float32: logits, and the gradient of the stem."""
    if machine.device != 'gpu':
        yield needs_gpu('float16 and bfloat16 against float32')
        return
    import numpy as np
    for config in (LARGE, WITH_LAMBDA):
        plain, gradient = logits_and_gradient(config, '')
        for dtype, (rms, cosine) in HALF.items():
            mixed, other = logits_and_gradient(config, dtype)
            name = f'{Path(config).stem} {dtype}'
            yield at_most(f'{name}: rms of the logits', float((mixed - plain).std() / plain.std()), rms)
            product = (gradient * other).sum() / np.sqrt((gradient ** 2).sum() * (other ** 2).sum())
            yield at_most(f'{name}: 1 - cosine of the gradients', 1 - float(product), 1 - cosine)


def logits_and_gradient(config: str, dtype: str) -> tuple[Any, Any]:
    """Return logits on the GPU, and the gradient of their sum of squares by the first weights, as arrays."""
    pair = build(config, 'gpu')
    logits = forward_of(pair, dtype)
    logits.square().sum().backward()
    return logits.numpy(), pair[0].parameters()[0].grad.numpy()


def steps(machine: Machine) -> Iterator[Check]:
    """Compare the losses of a training with everything on, on the GPU, with those on the CPU."""
    if machine.device != 'gpu':
        yield needs_gpu('losses of twelve steps against those of the CPU')
        return
    on_cpu = Machine('cpu', 0, machine.folder)
    variants: dict[str, list] = {
        'recipe': [], 'recompute': ['TRAIN.RECOMPUTE', 1], 'freeze': ['MODEL.FREEZE', 1]}
    for name, more in variants.items():
        gpu = run(machine, f'steps-{name}-gpu', *RECIPE, *more)
        cpu = run(on_cpu, f'steps-{name}-cpu', *RECIPE, *more)
        yield at_most(f'{name}: losses', apart(losses(gpu), losses(cpu)), 1e-3)


def overflow(machine: Machine) -> Iterator[Check]:
    """Let float16 gradients overflow: the step is skipped, and the training goes on."""
    if machine.device != 'gpu':
        yield needs_gpu('overflow of float16')
        return
    from config import get_config
    from training import engine
    from training.mixed_precision import LossScaler
    original: Callable = LossScaler.__init__

    def start_high(scaler: Any, enable: bool) -> None:
        original(scaler, enable, init_loss_scaling=2.0 ** 24)

    LossScaler.__init__ = start_high                # type: ignore
    folder = os.path.join(machine.folder, 'overflow')
    chosen = {**pairs(QUICK), 'AMP': True, 'AMP_DTYPE': 'float16', 'OUTPUT': folder, 'DEVICE': 'gpu',
              'DATA.DATA_PATH': make_images(os.path.join(machine.folder, 'images'))}
    engine.run(get_config(CONFIG, [word for pair in chosen.items() for word in pair]))
    text = Path(folder, 'metrics.jsonl').read_text(encoding='utf-8')
    skipped = [int(number) for number in re.findall(r'"skipped_steps": (\d+)', text)]
    yield Check('skipped steps', '1 or more, then none', str(skipped[-1]),
                PASSED if 0 < skipped[-1] == skipped[-2] else FAILED)
    yield Check('last loss', 'finite', str(losses(folder)[-1]),
                PASSED if math.isfinite(losses(folder)[-1]) else FAILED)


def attention(machine: Machine) -> Iterator[Check]:
    """Compare the ways to compute attention with each other: outputs, gradients, the same bits twice."""
    import paddle

    import ops
    from model.attention import HaloAttention
    from model.layers import use_operators
    from training.mixed_precision import make_autocast
    paddle.set_device(machine.device)
    paddle.seed(0)
    layer = HaloAttention(64, 64, 4, 8, 2)
    images = paddle.randn([4, 64, 20, 24])          # ragged: 20 is no multiple of 8

    def outputs(kind: str, dtype: str = '') -> list:
        use_operators(layer, kind)
        x = images.detach()
        x.stop_gradient = False
        with make_autocast(dtype)():
            out = layer(x).astype('float32')
        out.square().sum().backward()
        found = [out, x.grad, layer.pos_embed.height_rel.grad, layer.pos_embed.width_rel.grad]
        arrays = [value.numpy() for value in found]
        layer.clear_gradients()
        return arrays

    expected = outputs('composed')
    kinds = ['sdpa', *(['fused'] if machine.device in ops.load() else [])]
    for kind in kinds:
        limit = 1e-5 if machine.device == 'cpu' else TF32
        yield at_most(f'{kind} against composed', worst(outputs(kind), expected), limit)
    if 'fused' not in kinds:
        yield left_open('fused against composed', 'it cannot be compiled here; the log says why')
    for kind in ('composed', *kinds):
        same = all((x == y).all() for x, y in zip(outputs(kind), outputs(kind)))
        yield equal(f'{kind}: the same bits twice', same, True)
    if machine.device != 'gpu':
        yield needs_gpu('float16 and bfloat16')
        return
    for kind in ('composed', *kinds):
        for dtype, (limit, _) in HALF.items():
            yield at_most(f'{kind} in {dtype}', worst(outputs(kind, dtype), expected), 3 * limit)


def worst(arrays: list, expected: list) -> float:
    """Return the largest difference of any array, over the largest number expected in it."""
    return max(float(abs(x - y).max() / abs(y).max()) for x, y in zip(arrays, expected))


def ranks(machine: Machine) -> Iterator[Check]:
    """Compare a training on all GPUs, or on two processes of a CPU, with one on one device."""
    count = machine.processes
    if count < 2:
        yield left_open('several processes against one', 'needs two GPUs')
        return
    batch = 48 // count * count
    one = run(machine, 'ranks-one', 'DATA.BATCH_SIZE', batch)
    many = run(machine, 'ranks-many', 'DATA.BATCH_SIZE', batch // count, program='main_multi_gpu.py',
               flags=('-nprocs', str(count)))
    yield at_most(f'{count} processes against one: weights', weights_apart(many, one), 1e-3)
    yield at_most('evaluation', apart(losses(many, 'val'), losses(one, 'val')), 1e-3)


def synchronised_norms(machine: Machine) -> Iterator[Check]:
    """Train with TRAIN.SYNC_BN, whose start checks that the batch norms see all processes."""
    if machine.device != 'gpu' or machine.gpus < 2:
        yield left_open('TRAIN.SYNC_BN is global', 'needs two GPUs')
        return
    run(machine, 'sync', 'TRAIN.SYNC_BN', True, 'MODEL.FREEZE_NORM', False, program='main_multi_gpu.py',
        flags=('-nprocs', str(machine.gpus)))
    yield equal('TRAIN.SYNC_BN is global', True, True)


def deaths(machine: Machine) -> Iterator[Check]:
    """End processes in several ways, and look at the exit codes and the seconds until all have ended."""
    long = 'TRAIN.NUM_EPOCHS', 10_000
    count = max(machine.processes, 1)
    multi = 'main_multi_gpu.py', '-cfg', CONFIG, '-nprocs', str(count)
    for name, signum, expected in (('SIGKILL of a process', signal.SIGKILL, 1),
                                   ('SIGTERM of the program', signal.SIGTERM, 75)):
        process = start(*multi, *options(machine, f'deaths-{signum.name}', *long))
        metrics = os.path.join(machine.folder, f'deaths-{signum.name}', 'metrics.jsonl')
        wait_for_file(metrics, 120)
        victim = process.pid if signum == signal.SIGTERM or count < 2 else training_child(process.pid)
        began = time.monotonic()
        os.kill(victim, signum)
        code, _ = finish(process, 60)
        if count < 2 and signum == signal.SIGKILL:
            expected = -signal.SIGKILL
        yield equal(f'{name}: exit code', code, expected)
        yield at_most(f'{name}: seconds', time.monotonic() - began, 40)
    code, output = finish(start('main_single_gpu.py', '-cfg', CONFIG,
                                *options(machine, 'deaths-nan', 'TRAIN.BASE_LR', 1e30)))
    yield equal('loss that is not finite: exit code', code, 2)
    if machine.device != 'gpu':
        yield needs_gpu('out of memory')
        return
    code, output = finish(start('main_single_gpu.py', '-cfg', CONFIG, *options(
        machine, 'deaths-memory', 'DATA.IMAGE_SIZE', 8192, 'DATA.BATCH_SIZE', 48, 'DATA.NUM_WORKERS', 0)))
    yield equal('out of memory: exit code', (code, 'out of memory' in output), (2, True))


def wait_for_file(path: str, seconds: float) -> None:
    """Wait until a file exists. Raises TimeoutError."""
    end = time.monotonic() + seconds
    while not os.path.exists(path):
        if time.monotonic() > end:
            raise TimeoutError(f'no {path} within {seconds} s')
        time.sleep(0.05)


def training_child(parent: int) -> int:
    """Return the last one of the training processes that `parent` has spawned."""
    children = Path(f'/proc/{parent}/task/{parent}/children').read_text(encoding='ascii').split()
    commands = {int(child): Path(f'/proc/{child}/cmdline').read_bytes() for child in children}
    return max(child for child, command in commands.items() if b'spawn_main' in command)


def resumption(machine: Machine) -> Iterator[Check]:
    """Compare a run that was stopped and resumed with an uninterrupted one."""
    whole = run(machine, 'whole', *RECIPE, 'SAVE_STEPS', 5, 'SAVE_KEEP', 9)
    middle = os.path.join(whole, 'checkpoints', 'step_00000005.pdckpt')
    resumed = run(machine, 'resumed', *RECIPE, 'SAVE_STEPS', 5, 'SAVE_KEEP', 9, flags=('-resume', middle))
    difference = weights_apart(resumed, whole)
    limit = 0 if machine.device == 'cpu' else 1e-3
    yield at_most('resumed against uninterrupted: weights', difference, limit)
    yield noted('the same bits', difference == 0)


def static(machine: Machine) -> Iterator[Check]:
    """Compare a training with TRAIN.TO_STATIC with an eager one."""
    eager = run(machine, 'eager')
    traced = run(machine, 'traced', 'TRAIN.TO_STATIC', True)
    yield at_most('losses', apart(losses(traced), losses(eager)), 1e-3)


def speed(machine: Machine) -> Iterator[Check]:
    """Measure training steps of HaloNet-26-T by attention and precision, and name the fastest."""
    import csv
    table = os.path.join(machine.folder, 'speed.csv')
    words = ['train', '-cfg', LARGE, '-rounds', '1', '-profile', '-csv', table, '-device', machine.device]
    if machine.device == 'gpu':
        words += ['-batch', '64', '256', '-runs', '10', '-attention', 'composed', 'sdpa', 'fused',
                  '-precision', 'float32', 'tf32', 'float16', 'bfloat16']
    else:
        words += ['-batch', '2', '-runs', '1', '-attention', 'composed', 'sdpa', 'fused']
    code, output = finish(start('dev/benchmark.py', *words), 420)
    if code:
        raise RuntimeError(output.strip().splitlines()[-1])
    for line in output.splitlines():
        if 'left out' in line:
            yield left_open(line.partition(':')[0], line.partition('left out: ')[2])
    with open(table, encoding='utf-8', newline='') as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        yield noted(f'batch {row["batch"]} {row["engine"]}', f'{float(row["images_per_s"]):.0f} images/s, '
                    f'{float(row["mib"]):.0f} MiB, {row["launches"]} launches, {row["waits"]} waits')
    fastest = max(rows, key=lambda row: float(row['images_per_s']))
    yield noted('MODEL.ATTENTION that auto should take here', fastest['engine'].split()[0])


def tools(machine: Machine) -> Iterator[Check]:
    """Export a model, and predict with it: the programs compare their own results."""
    weights = os.path.join(run(machine, 'tools'), 'final.pdparams')
    picture = os.path.join(machine.folder, 'images', 'val', '0.png')
    common = ['-pretrained', weights, '-device', machine.device]
    for name, words in (
            ('export', [*common, '-format', 'paddle', '-output', os.path.join(machine.folder, 'exported')]),
            ('predict', [*common, picture]),
            ('visualize', [*common, picture, '-output', os.path.join(machine.folder, 'attention.webp')])):
        code, output = finish(start(f'tools/{name}.py', *words))
        lines = output.strip().splitlines() or ['']
        yield Check(name, 'exit code 0', f'exit code {code}: {lines[-1]}', FAILED if code else PASSED)


def memory(machine: Machine) -> Iterator[Check]:
    """Take many training steps, and look whether the memory grows."""
    import paddle

    from config import get_config
    from halonet import build_halonet
    paddle.set_device(machine.device)
    model = build_halonet(get_config(CONFIG))
    optimizer = paddle.optimizer.AdamW(1e-4, parameters=model.parameters())
    images = paddle.randn([16, 3, 32, 32])
    count = 500 if machine.device == 'gpu' else 100
    used = []
    for _ in range(count):
        model(images).square().mean().backward()
        optimizer.step()
        optimizer.clear_grad(set_to_zero=False)
        used.append(held(machine.device))
    tenth = count // 10
    growth = max(used[-tenth:]) / max(used[tenth:2 * tenth]) - 1
    yield at_most(f'growth over {count} steps', growth, 0.01 if machine.device == 'gpu' else 0.05)


def held(device: str) -> int:
    """Return the bytes that Paddle holds on a GPU, or that this process has in memory."""
    import paddle
    if device == 'gpu':
        return paddle.device.cuda.memory_allocated()
    pages = int(Path('/proc/self/statm').read_text(encoding='ascii').split()[1])
    return pages * os.sysconf('SC_PAGE_SIZE')


UNVERIFIED = re.compile(r'no GPU has|not verified|unverified|not run on a GPU|was run on a GPU', re.I)


def sentences(machine: Machine) -> Iterator[Check]:
    """List the sentences of README and docs that a GPU may now make untrue."""
    for path in [Path(cli.ROOT, 'README.md'), *sorted(Path(cli.ROOT, 'docs').glob('*.md'))]:
        for number, line in enumerate(path.read_text(encoding='utf-8').splitlines(), 1):
            if UNVERIFIED.search(line):
                yield left_open(f'{path.relative_to(cli.ROOT)}:{number}', line.strip())


ROWS: dict[str, tuple[Callable[[Machine], Iterator[Check]], int]] = {       # name: function, seconds
    'machine': (machine_facts, 60), 'forward': (forward, 300), 'mixed precision': (mixed_precision, 180),
    'steps': (steps, 300), 'overflow': (overflow, 120), 'attention': (attention, 300), 'ranks': (ranks, 180),
    'synchronised norms': (synchronised_norms, 120), 'deaths': (deaths, 300), 'resumption': (resumption, 180),
    'static': (static, 180), 'speed': (speed, 480), 'tools': (tools, 180), 'memory': (memory, 180),
    'sentences': (sentences, 60)}
