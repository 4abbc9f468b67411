"""The loss functions of other projects, as `check_loss` calls a loss, and what it finds.

Run in an environment of their own that has them (`python -m benchmarks.peer_losses --help`); what is not installed is left
out. There: torch, then trl, tensordict and torchrl with what they ask for; with --no-deps liger-kernel, verl, skyrl,
hatchery-core, torchtune, tinker-cookbook and areal; and colorlog, hypothesis, jaxtyping, loguru, omegaconf, wadler-lindig.
"""
