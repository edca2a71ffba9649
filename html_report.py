def write_html(run, manifest, comparison):
    pass
