"""Several processes: torchrun's environment, collectives, DDP and FSDP, the watchdog, the launcher."""
