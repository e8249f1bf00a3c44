"""COCO's 80 categories and the words that captions use for them (our own list), for CHAIR and for synonyms.

A phrase is one or more singular words. The longest phrase wins, so that a hot dog is not a dog; phrases that contain a
category's word but mean something else map to no category (a train track is not a train).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

_CATEGORIES = """
person: human man woman boy girl child kid baby toddler guy lady gentleman adult teenager people player rider skier
    surfer snowboarder skateboarder pedestrian passenger driver worker student chef cook waiter waitress police_officer
    officer policeman policewoman fireman firefighter soldier batter pitcher catcher umpire bride groom tourist shopper
    customer spectator fan audience biker cyclist bicyclist motorcyclist vendor farmer father mother mom dad son
    daughter brother sister couple family crowd infant female male athlete performer musician goalie referee
bicycle: bike cycle tricycle mountain_bike push_bike
car: automobile sedan suv taxi cab hatchback minivan jeep convertible police_car race_car coupe
motorcycle: motorbike motor_bike scooter moped dirt_bike motor_cycle
airplane: plane aircraft jet airliner aeroplane jumbo_jet biplane jetliner
bus: double_decker double_decker_bus school_bus minibus trolley_bus tour_bus city_bus
train: locomotive tram subway_train passenger_train freight_train trolley railcar steam_engine train_car
truck: pickup pickup_truck lorry fire_truck firetruck semi semi_truck trailer_truck dump_truck tow_truck garbage_truck
    van
boat: ship sailboat canoe kayak yacht ferry rowboat vessel raft motorboat gondola speedboat dinghy
traffic light: traffic_signal stoplight stop_light street_light_signal traffic_lamp
fire hydrant: hydrant
stop sign: stopsign
parking meter: meter
bench: park_bench pew
bird: duck goose seagull gull pigeon parrot owl eagle hawk swan chicken rooster hen penguin flamingo ostrich crow
    sparrow heron pelican peacock duckling turkey
cat: kitten kitty feline tabby
dog: puppy pup canine poodle labrador terrier bulldog retriever dachshund pug
horse: pony colt foal stallion mare stallion racehorse
sheep: lamb ram ewe
cow: cattle calf bull ox steer heifer bovine
elephant: baby_elephant
bear: polar_bear grizzly grizzly_bear cub black_bear brown_bear panda
zebra: baby_zebra
giraffe: baby_giraffe
backpack: rucksack knapsack book_bag
umbrella: parasol
handbag: purse hand_bag pocketbook clutch tote tote_bag
tie: necktie bow_tie bowtie
suitcase: luggage briefcase suit_case baggage travel_bag
frisbee: flying_disc disc disk
skis: ski
snowboard: snow_board
sports ball: ball baseball soccer_ball tennis_ball football basketball volleyball softball
kite: paraglider
baseball bat: bat
baseball glove: baseball_mitt mitt catcher_mitt
skateboard: skate_board longboard
surfboard: surf_board bodyboard boogie_board paddle_board
tennis racket: racket racquet tennis_racquet
bottle: water_bottle wine_bottle beer_bottle flask
wine glass: wine_glasses goblet wineglass champagne_glass
cup: mug teacup coffee_cup tea_cup coffee_mug tumbler paper_cup
fork: pitchfork_utensil
knife: butter_knife steak_knife pocket_knife
spoon: teaspoon ladle tablespoon
bowl: soup_bowl salad_bowl
banana: plantain
apple: green_apple
sandwich: burger hamburger cheeseburger sub_sandwich panini blt
orange: tangerine clementine mandarin
broccoli: broccoli_floret
carrot: baby_carrot
hot dog: hotdog chili_dog corn_dog
pizza: pizza_pie pizza_slice
donut: doughnut bagel_donut
cake: cupcake cheesecake birthday_cake wedding_cake layer_cake pastry_cake
chair: armchair stool recliner seat rocking_chair lawn_chair beach_chair office_chair
couch: sofa loveseat settee futon
potted plant: plant houseplant house_plant flower_pot potted_flower pot_plant
bed: bunk_bed mattress cot
dining table: table kitchen_table dinner_table desk coffee_table picnic_table side_table
toilet: urinal commode toilet_seat
tv: television tv_set television_set flat_screen monitor screen
laptop: laptop_computer notebook_computer macbook
mouse: computer_mouse
remote: remote_control wii_remote wii_controller game_controller controller
keyboard: computer_keyboard
cell phone: phone cellphone mobile_phone smartphone smart_phone iphone telephone
microwave: microwave_oven
oven: stove stovetop range_oven
toaster: toaster_oven
sink: basin wash_basin washbasin
refrigerator: fridge freezer
book: textbook novel paperback
clock: clock_tower grandfather_clock alarm_clock wall_clock
vase: flower_vase
scissors: scissor shears
teddy bear: teddy stuffed_bear stuffed_animal teddybear
hair drier: hair_dryer hairdryer blow_dryer hairdrier
toothbrush: tooth_brush
"""

# Phrases that contain a category's word but mean something else.
_OTHER = """
home_plate license_plate train_track train_station train_platform railroad_track train_yard bus_stop bus_station
car_seat car_door toilet_paper toilet_bowl toilet_brush book_shelf bookshelf bookcase bed_room bed_spread phone_booth
computer_desk_chair clock_face cow_boy cowboy horse_back hot_plate tennis_court tennis_match tennis_player_uniform
baseball_field baseball_game baseball_cap baseball_uniform soccer_field soccer_game football_field football_game
basketball_court ski_slope ski_lift ski_resort ski_pole tree_bear table_cloth tablecloth cup_board cupboard kite_string
bird_house bird_feeder dog_house dog_bowl cat_food dog_food cake_stand knife_block parking_lot boat_dock wine_cellar
chair_lift chairlift bike_rack bike_lane bicycle_rack motorcycle_helmet bicycle_helmet bike_helmet horse_carriage
bench_press remote_area remote_location remote_island orange_juice apple_juice carrot_cake_mix tv_stand couch_cushion
bed_frame window_seat back_seat front_seat plant_life power_plant mouse_pad keyboard_key screen_door apple_tree
orange_tree banana_tree surf_board_rack fire_place wild_life traffic_light_pole street_sign
"""


def _table() -> tuple[tuple[str, ...], dict[tuple[str, ...], str | None]]:
    names, phrases = [], {}
    for line in _CATEGORIES.replace("\n    ", " ").strip().splitlines():
        name, _, words = line.partition(":")
        names.append(name)
        for word in (name.replace(" ", "_"), *words.split()):
            phrases[tuple(word.split("_"))] = name
    phrases |= {tuple(word.split("_")): None for word in _OTHER.split()}
    return tuple(names), phrases


CATEGORIES: tuple[str, ...]
PHRASES: Mapping[tuple[str, ...], str | None]  # singular words → category, or None where none is meant
CATEGORIES, _phrases = _table()
PHRASES = MappingProxyType(_phrases)
LONGEST = max(len(phrase) for phrase in PHRASES)
