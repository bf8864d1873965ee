"""Pure: from host facts to the devices that are offered, their names, their health, and which to prefer.

No I/O, no clock, no globals; the modules here can be read, and tested, without a loop.
"""
