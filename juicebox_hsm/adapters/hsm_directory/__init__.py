"""An HSM inside this process, and the directory that holds its keys and NVRAM."""
