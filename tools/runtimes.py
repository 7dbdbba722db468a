"""Open exported models in inference runtimes.

Each is a function from images, (B, C, H, W) float32 unless the file takes others, to logits (B, K). A file
with several outputs gives a tuple. An absent package raises ValueError with the command that installs it.
"""
import functools
import importlib
import os
import time
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any, Callable

INSTALL = 'python -m pip install -r requirements-export.txt'
PIECE = 4                                           # images that a thread of ONNX Runtime takes at once

Runtime = Callable[[Any], Any]                      # images -> logits, numpy arrays


def need(name: str) -> ModuleType:
    """Import the package `name`. Raises ValueError where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(f'{name} cannot be imported ({error}); {INSTALL}') from None


def one_or_all(outputs: list) -> Any:
    """Return the only output, or all as a tuple."""
    return outputs[0] if len(outputs) == 1 else tuple(outputs)


def paddle_inference(folder: str, threads: int = 2) -> Runtime:
    """Open folder/model.json in Paddle Inference with oneDNN."""
    from paddle import inference
    config = inference.Config(os.path.join(folder, 'model.json'), os.path.join(folder, 'model.pdiparams'))
    config.disable_glog_info()
    config.set_cpu_math_library_num_threads(threads)
    predictor = inference.create_predictor(config)
    input_name = predictor.get_input_names()[0]
    output_names = predictor.get_output_names()

    def run(images: Any) -> Any:
        predictor.get_input_handle(input_name).copy_from_cpu(images)
        predictor.run()
        return one_or_all([predictor.get_output_handle(name).copy_to_cpu() for name in output_names])

    return run


def onnxruntime(path: str, threads: int = 2) -> Runtime:
    """Open an ONNX file in ONNX Runtime.

    If the batch size is free and there are enough images, each thread computes a few of them at a time.
    Then no thread waits for the others in every layer.
    """
    import numpy as np
    ort = need('onnxruntime')

    @functools.lru_cache(None)
    def session(threads: int) -> Any:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3              # errors; a file for any size has harmless warnings
        return ort.InferenceSession(path, options, providers=['CPUExecutionProvider'])

    model_input = session(threads).get_inputs()[0]
    has_fixed_batch = isinstance(model_input.shape[0], int)
    pool = ThreadPoolExecutor(threads)

    def run_once(images: Any, threads: int) -> list:
        return session(threads).run(None, {model_input.name: images})

    def run(images: Any) -> Any:
        if has_fixed_batch or len(images) < 2 * threads:
            return one_or_all(run_once(images, threads))
        session(1)                                  # made here, not by several threads
        size = min(PIECE, len(images) // threads)
        pieces = [images[i:i + size] for i in range(0, len(images), size)]
        outputs = zip(*pool.map(functools.partial(run_once, threads=1), pieces))
        return one_or_all([np.concatenate(parts) for parts in outputs])

    return run


def openvino(path: str, threads: int = 2, precision: str = 'f32') -> Runtime:
    """Open an ONNX file in OpenVINO.

    The precision is explicit: on processors with bfloat16 OpenVINO uses that by default, with errors of 4e-3.
    """
    core = need('openvino').Core()
    options = {'INFERENCE_NUM_THREADS': threads, 'INFERENCE_PRECISION_HINT': precision}
    compiled = core.compile_model(core.read_model(path), 'CPU', options)
    request = compiled.create_infer_request()

    def run(images: Any) -> Any:
        return request.infer([images])[compiled.output(0)].copy()

    return run


def time_by_turns(programs: dict[str, Runtime], images: Any, rounds: int) -> dict[str, list[float]]:
    """Run programs on the same images by turns; return {name: milliseconds of an image in each round}.

    A first round is not counted.
    """
    times: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(rounds + 1):
        for name, program in programs.items():
            start = time.perf_counter()
            program(images)
            times[name].append(1000 * (time.perf_counter() - start) / len(images))
    return {name: values[1:] for name, values in times.items()}
