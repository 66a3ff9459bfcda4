"""How many workers of each kind for a workload and its objectives: a mixed-integer program (docs/planning.md).

workload_model   what arrives: sessions, rounds, tokens, tool gaps
worker_kinds     what a worker of each GPU type and parallel degree does with it
queueing         from utilisation to waiting times and missed objectives
program          the program: variables, constraints, objectives
solve            HiGHS, and what its answer means
prediction       attainment and latencies of a plan at a rate
infeasible       which constraint cannot hold, and the smallest relaxation
simulated        the best plans, simulated with the policy that will run
"""
