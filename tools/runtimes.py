"""What runs an exported model, each as a function images (B, 3, H, W) float32 -> logits (B, K).

A package that is absent is a ValueError that names the command to install it.
"""
import functools
import importlib
import os
from concurrent.futures import ThreadPoolExecutor

INSTALL = 'python -m pip install -r requirements-export.txt'


def need(name):
    """The package `name`. Raises ValueError where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(f'{name} cannot be imported ({error}); {INSTALL}') from None


def paddle_inference(folder, threads=2):
    """Paddle Inference with oneDNN, on folder/model.json."""
    from paddle import inference
    config = inference.Config(os.path.join(folder, 'model.json'), os.path.join(folder, 'model.pdiparams'))
    config.disable_glog_info()
    config.set_cpu_math_library_num_threads(threads)
    predictor = inference.create_predictor(config)
    given, result = predictor.get_input_names()[0], predictor.get_output_names()[0]

    def run(images):
        predictor.get_input_handle(given).copy_from_cpu(images)
        predictor.run()
        return predictor.get_output_handle(result).copy_to_cpu()

    return run


def onnxruntime(path, threads=2):
    """Of a model for any batch, the threads take a few images each at a time where there are enough: so none of them waits for
    the others in every layer."""
    import numpy as np
    ort = need('onnxruntime')

    @functools.lru_cache(None)
    def session(threads):
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        return ort.InferenceSession(path, options, providers=['CPUExecutionProvider'])

    given = session(threads).get_inputs()[0]
    pool = ThreadPoolExecutor(threads)

    def run(images):
        if isinstance(given.shape[0], int) or len(images) < 2 * threads:
            return session(threads).run(None, {given.name: images})[0]
        size, alone = min(4, len(images) // threads), session(1)
        pieces = [images[i:i + size] for i in range(0, len(images), size)]
        return np.concatenate(list(pool.map(lambda piece: alone.run(None, {given.name: piece})[0], pieces)))

    return run


def openvino(path, threads=2, precision='f32'):
    """On processors with bfloat16 OpenVINO takes that by itself, with errors of 4e-3; so the precision is said."""
    core = need('openvino').Core()
    compiled = core.compile_model(core.read_model(path), 'CPU',
                                  {'INFERENCE_NUM_THREADS': threads, 'INFERENCE_PRECISION_HINT': precision})
    request = compiled.create_infer_request()
    return lambda images: request.infer([images])[compiled.output(0)].copy()
