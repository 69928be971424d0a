"""A bridge to SEA-HELM (https://github.com/aisingapore/SEA-HELM): prepare, run, report.

    facts.py      what is known of the version that was read: suite, tasks, metrics, baselines
    prepare.py    a checkpoint as SEA-HELM wants it, the suite of some languages, the command line
    checkout.py   a checkout's version, options and tasks; a folder of links with our suite
    launch.py     the runs, one a seed
    results.py    its result files, checked
    scores.py     task -> competency -> language -> SEA, over seeds
    report.py     table, JSON, Markdown, HTML

SEA-HELM is neither a dependency nor copied: it is run as a program, from a checkout given by path.
"""
