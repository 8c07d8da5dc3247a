def write_papers(out, config, record, answers):
    return {}
