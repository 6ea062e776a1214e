"""`python -m stages.report`."""

from stages.report.page import main
from stages.run import console

console.run(main)
