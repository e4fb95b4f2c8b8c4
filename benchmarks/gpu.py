"""Says whether this project works, and how fast it is, on the GPU of this machine.

    python benchmarks/gpu.py                                       # ours alone
    python benchmarks/gpu.py --jax-python PYTHON --torch-python PYTHON   # beside diffrax, torchdiffeq and torchode

`PYTHON` is an interpreter with a GPU build of the library. The script runs the tests that matter on a GPU, then the
cases of `make bench`. It ends with one line for each of the two, and writes gpu.md.

Tests that compare with closed forms run with 32-bit products, because a GPU rounds them to fewer digits by default.
"""

import os
import pathlib
import subprocess
import sys

HERE = pathlib.Path(__file__).parent
TESTS = (
    "test_minimal.py",
    "test_gradients.py",
    "test_checkpointed.py",
    "test_higher_order.py",
    "test_jit_compile.py",
    "test_ode_layer.py",
    "test_ode_rnn.py",
    "test_neural_cde.py",
    "test_latent_ode.py",
    "test_continuous_flow.py",
    "test_mixed_precision.py",
    "test_solutions.py",
    "test_stiff.py",
    "test_gpu.py",
)


def main() -> int:
    """Runs the tests and the comparison. Returns 0 if both end well."""
    import tensorflow as tf

    gpus = tf.config.list_physical_devices("GPU")
    if not gpus:
        print("TensorFlow finds no GPU here. Install its GPU build: pip install 'tensorflow[and-cuda]'")
        return 2
    name = tf.config.experimental.get_device_details(gpus[0]).get("device_name", gpus[0].name)
    # Every process takes memory as it needs it, since several share the GPU.
    env = {
        **os.environ,
        "TF_FORCE_GPU_ALLOW_GROWTH": "true",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "NVIDIA_TF32_OVERRIDE": "0",
        "TF_CPP_MIN_LOG_LEVEL": "2",
    }
    tests = [HERE.parent / "tests" / test for test in TESTS]
    tested = subprocess.run([sys.executable, "-m", "pytest", "-q", "-n", "4", *tests], env=env, cwd=HERE.parent)
    compare = [sys.executable, HERE / "compare.py", "--python", sys.executable, "--out", HERE / "gpu.md"]
    compared = subprocess.run([*compare, *sys.argv[1:]], env=env)
    print(f"{name}: the tests {'failed' if tested.returncode else 'passed'}")
    print(f"{name}: the comparison {'failed' if compared.returncode else 'is in ' + str(HERE / 'gpu.md')}")
    return tested.returncode or compared.returncode


if __name__ == "__main__":
    sys.exit(main())
