"""The decoding core of continuous models: loop, run, chain, verification, speculation."""
