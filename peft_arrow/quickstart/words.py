"""The words that the generated tasks draw from; every pool is split between training and held-out rows."""

NOUNS = """apple army artist axe baby bakery band bench berry bird body bottle box branch bridge brush bush butcher
calf camera canary candle candy cargo castle cat cherry child church circus city class clock coach company copy country
cross crowd daisy dancer deer diary dish dog donkey door dress duck duty elf enemy engine factory fairy family farmer
fax ferry fish flag flower fly foot forest fox gallery garden glass goose grape grass guitar hammer hero hobby horse
house island jacket jelly journey judge key kiss knife ladder lady leaf lens library life loaf lorry lunch man match
memory mirror monkey mouse mouth navy needle nurse orange ox paper party patch peach penny person pillow planet poet
pony potato prince puppy queen radish river roof salary scarf sheep shelf shoe sketch sky spider spoon spy stitch story
student switch table tax teacher thief ticket tomato tooth torch tree valley victory village violin wallet watch
whale wife window wish witch wolf woman worker wrench zebra""".split()

ADJECTIVES = """active actual basic best bold brief bright broad busy calm cheap clean clear cold common cool current
daily dark deep default early easy empty equal exact extra fair false fast final first flat free fresh full general
global good gross hard heavy hidden high hot huge inner joint large last late light live local long low main major
minor mixed modern monthly narrow net new next old open outer partial past plain previous prime private public quick
quiet rapid raw real recent red remote round rural safe sharp short simple single slow small smart soft solid special
stable steady strong sweet tall thin tiny total true typical upper urban valid warm weekly white wide wild yearly
young""".split()

TABLES = """accounts actors albums animals artists authors books branches cars chefs clients clubs countries courses
customers doctors drivers employees events farms flights games guests hotels houses invoices lakes lawyers machines
members movies museums nurses orders owners parks patients phones pilots planets players poems products projects
recipes rivers rooms schools ships singers songs stores students suppliers teachers teams tickets tools tourists towns
trains trips trucks users visitors workers writers""".split()

COLUMNS = """age amount balance budget capacity cost debt depth discount distance duration fee height income length
level likes points population price profit quantity rank rating revenue salary score size speed stock tax total volume
votes wage weight width year""".split()
