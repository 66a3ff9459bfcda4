"""Planning that goes on while sessions run: which workers should change their role, and when it is worth it.

observed   the workload of the last minutes, from rounds that ended
running    the workers that there are, as the program sees them
roles      the best roles for them, and the fewest changes that suffice
replanner  when to act: pressure that lasts, a gain that pays, a budget of changes
"""
