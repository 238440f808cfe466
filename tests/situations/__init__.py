"""Other people's projects, one by one: the callback is added to each with nothing configured, and its maps are checked.

`situation` is what a project is, `project` its usual parts, `check` what must come out, `README.md` the table of all.
"""
