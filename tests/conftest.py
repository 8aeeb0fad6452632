"""Environment of the tests, set before anything is imported: no network, no windows, no run sent anywhere."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "disabled"
os.environ["MPLBACKEND"] = "Agg"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # silences the warning about forked data loaders
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are tiny: a second thread mostly waits for the first
