"""Instruction data: from files of any common format to token ids with a mask of what is trained. No torch."""
