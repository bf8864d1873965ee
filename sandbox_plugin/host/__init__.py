"""The only part that touches sysfs, /dev and the kernel's events.

Everything is read below one `HostPaths` root, so that a fake tree is just another root.
"""
