"""memory.py PID: counts the text on stdin in all readable mappings of a process."""

import os
import sys


def main():
    process = f"/proc/{sys.argv[1]}"
    text = sys.stdin.buffer.readline().rstrip(b"\n")
    memory = os.open(f"{process}/mem", os.O_RDONLY)
    with open(f"{process}/maps") as file:
        maps = [line.split() for line in file]
    times = 0
    for addresses, access, *rest in maps:
        # pages of the kernel, which /proc/PID/mem cannot read
        if "r" not in access or rest[-1] in ("[vvar]", "[vvar_vclock]", "[vsyscall]"):
            continue
        start, end = (int(address, 16) for address in addresses.split("-"))
        part = b""
        while start + len(part) < end:
            part += os.pread(memory, end - start - len(part), start + len(part))
        times += part.count(text)
    print(times)


main()
