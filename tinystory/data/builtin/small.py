"""Short plots: one event with an unexpected outcome. Markup as in grammar.py."""

PLOTS = r"""
== the firefly lamp: child paw folk
plan = read in bed / find {his} socks at night / see {his} toys in the dark

[{opening} {He} wanted a lamp so that {he} could {plan}. One night, {he} caught a firefly and [put the jar by {his}
bed|closed the lid of the jar].|One summer night, {h.a} caught a firefly in a jar. Now {he} could {plan}.] <"Now you
are my lamp," {he} said.>

At first, it shone like [a small green star|a candle|a tiny moon]. But each night, its light got [weaker|smaller].
<{h} gave it sugar. {He} gave it a leaf. It sat at the bottom and did not move.> "[What is wrong|Are you sick]?" {he}
asked. It only looked [out of the window|at the dark garden]. [Outside, a hundred lights were dancing.|Out there, its
brothers and sisters were dancing.|Small lights moved in the trees.] {h} [swallowed hard|looked at them for a long
time]. Then {he} opened the jar.

[The firefly flew off, and it was dark.|Out it flew, and the room was black.|It sat on the edge for a moment, and then
it was gone.] {h} [lay still and felt brave and sad|pulled the blanket up]. [Then something shone, and something
else.|Then there was a light, and one more.|But then the wall turned green and gold.] [The firefly was back, with its
whole family.|In through the window came ten, twenty, a hundred fireflies.] They [filled the room with stars|danced
over {his} bed] until {he} fell asleep. [And the jar? {He} keeps flowers in it.|After that, {he} never closed the
window in summer.]

== the hiccups: child paw folk
cure & out = drink water upside down & Water came out of {his} nose / hold your breath & {He} held it until {his} ears
    were red / stand on your head & {He} fell into the flowers / eat a spoon of salt & {He} made a terrible face
scare = jumped out from behind the door with a pot on {f.his} head / put on a sheet and howled / blew a horn right
    beside {his} ear

[{opening} {day}, {he} got the hiccups.|"Hic!" said {h.full}. "Oh no. Hic!"] "You must {cure}," said {mom}. So {he}
did. {Out}. "Hic!" <{h} could not talk, sing, or drink {his} milk without spilling it.> <"Count to a hundred," said
{g.a}. {h} got to ninety. "Ninety-hic!">

{His} friend {f.full} had a better idea. {F.he} {scare}. "BOO!" [{h} screamed and jumped into a bush.|{h} jumped so
high that {he} lost a shoe.] [Then it was quiet.|They listened.] <They waited.> [Not one hic.|Nothing.] "They are
gone!" said {h}. "[Thank you|You did it]!" "[Easy|That was nothing]," said {f} proudly, "hic!" [{h} smiled and went to
look for a sheet.|"Now you must {cure}," said {h}.]

== the wind and the hat: child folk
look = tall and red / blue and round / soft and brown / made of yellow straw
who & need = A scarecrow had it on & It had never had a hat, and the sun had burned its face / An old donkey had it on
    & It had always wanted a hat, but nobody had asked / A brown bird sat in it & Under her wings were four warm eggs
    / A snowman had it on & It had been bald all winter

[{opening} {He} was proud of {his} new hat. It was {look}.|{H.full} had a new hat. It was {look}, and {he} wore it
even in the bath.] But one [day|morning], the wind [took it|wanted it too]. [Whoosh!|Off it flew.] {h} ran after it,
[over a fence and under a fence|through the mud]. <Each time {he} came close, the wind laughed and took it farther.>

At last, {he} found it, [on the far side of the hill|in the last field]. {who}. {need}. {h} [reached out {his}
{hand}|opened {his} mouth to speak]. Then {he} looked again. [That hat had never looked so good.|The hat looked as if
it had come home.] "[It suits you|Keep it]," {he} said. <The wind was quiet for a moment. It was a little ashamed.>

{h} walked home with a cold head and a warm [heart|feeling]. [The next day, on the step, lay a feather, a long blue
one. Only the wind could have put it there.|And {mom}, who saw it all from the window, had already begun to make a new
one.|"Where is your hat?" asked {mom}. "It got a job," said {h}.]

== the mud pie: child paw
topping = seven small stones / a yellow flower / grass and a feather / a ring of acorns

[{opening} {He} was not allowed to use the oven, so {he} made a pie from mud.|{day}, {h.a} baked a pie. It was made of
mud, with {topping} on top.] <{He} stirred it with a stick and baked it in the sun.> "[Who wants pie|Pie is ready]!"
{he} called.

{His} friend {f.full} came first and sat down politely. "[Mmm|It smells of rain]," {f.he} said. "[May I take mine
home|May I save mine for tomorrow]?" Then came {mom}. "[I just had lunch|It is too pretty to eat]," said {mom}. <{G.a}
came, too, looked at it, and remembered something important at home.> {h} [sat alone with the pie|looked at the whole
pie]. <"Nobody is hungry," {he} said.>

Then the pie moved. [A worm put out its head!|Out came a worm!] [It looked left. It looked right.|It looked around.]
It took [a bite|a long, slow bite]. "[Finally, some good food|Very fine, very fine]," said the worm. "[Do you take
orders?|Who is the cook?]" {h} [sat up straight|beamed]. [From that day on, the small brown restaurant behind the
{home} was never empty.|By evening, there was a line of worms all the way to the fence.|The next day, {he} baked ten
more.]

== the last one: child paw
sweet & many = cookie & cookies / strawberry & strawberries / bun & buns / pancake & pancakes
bird = a crow / a goat / a squirrel / an ant and all her sisters

[{opening} {He} and {his} friend {f.full} had a plate of {many}, and then there was only one.|There was one {sweet}
left. {h.full} looked at it. {His} friend {f.full} looked at it, too.] "[It is mine, because I am smaller|I saw it
first]," said {h}. "[It is mine, because I am hungrier|I smelled it first]," said {f}. <"My birthday is sooner." "My
tummy is bigger."> "[We could cut it|We could share]," said {h}, "but I get the big half." "[There is no big half|Half
is half|Then I get the other big half]!"

They argued [until the milk was warm|for a long time]. They [stood up and shook their heads at each other|did not look
at the plate even once]. Then {h} [reached out|turned around]. [The plate was empty!|There was nothing on the plate!]
On the wall sat {bird}, with crumbs all around. "[Very good|Thank you]," it said. "[Is there more?|You two are so
kind.]"

{h} looked at {f}. {f} looked at {h}. [Then they laughed until they had to lie down.|"Next time, half," said {f}.
"Next time, half," said {h}.] They licked the plate, [one side each|each to the middle].

== the shadow: child puppy
did = danced / jumped / turned around / took a bow

[{opening} One [evening|morning], {he} saw something dark behind {him}.|{H.a} was walking home when the sun came out.
And there, right behind {him}, was somebody long and dark.] {H.full} ran. It ran, too. [{He} stopped. It stopped.|{He}
ran faster. It ran faster.] "[Leave me alone|Go away]!" {he} cried. It [said nothing|did not answer]. <{He} hid behind
a tree, and it was gone. {He} came out, and it was back.>

{His} friend {f.full} was sitting on the fence. "[That is only your shadow|It is you, only flat]," said {f}.
"[Everybody has one.|Look, I have one, too.]" {h} [lifted one foot|waved]. [The shadow did the same.|So did the
shadow.] {He} {did}. It {did}, too. <It was rather good at it.> "[It knows all my games|It likes what I like]!" said
{h}.

They played until the sun went down, and the shadow grew [as long as the street|taller and taller] and then was gone.
"Where did it go?" asked {h}. "To bed," said {f}. [So {h} went to bed as well. "See you tomorrow," {he} said.|And in
the morning, when the sun came up, the shadow was there first.]

== the end of the rainbow: child paw folk
spot & yours = right on your head & on yours / just above your head & above yours / right on your nose & on yours

[{opening} After the rain, there was a rainbow.|The rain stopped, and a rainbow stood over the hills.] "[I want to see
where it ends|At the end, there must be gold]," said {h.full}, and {he} [put on {his} boots|took a bag]. It ended
[behind the school|in the meadow by the church|behind the old barn]. But when {he} got there, it ended behind [the
next hill|the river]. {He} walked and walked. <It was like running after a cat that does not want to be caught.>

On a [bridge|hill], {he} met {f.a}, wet and out of breath. "[Stop|Do not move]!" cried {f}. "It ends {spot}!"
"[Here|Really]?" asked {h}. "[From here, it ends {yours}|But it ends {yours}]!" They [looked up|both looked up].
<There was no gold, only rain.> Then they both [began to laugh|sat down].

"[I looked for gold|I walked all day]," said {f}. "Me too," said {h}. "[What have you found|And what did you find]?"
{F} thought about it. "You," {f.he} said. [They shared {h}'s {food} while the colors went out, one by one.|So they
were at both ends at once, and that was better than gold.]

== the snail comes to visit: child paw folk
gift = a berry / a round stone / one flower / a very small cake

[{opening} {He} sent a letter to {his} friend the snail. "Come to my birthday," it said.|{h.full} had a birthday, and
everybody came but {his} friend the snail.] [{He} waited until dark.|{He} saved a piece of cake.] <The snail did not
come.> "[Maybe he forgot|He does not like me any more]," said {h}.

[Fall came, and winter, and spring.|Many weeks went by.|The leaves fell, and the snow fell, and the snow melted.] {h}
had almost forgotten it. [Then one morning, there was a very soft knock.|Then, one day, something scratched at the
door.] On the step sat the snail, [tired and dusty|with mud up to his eyes]. "[I am a little late|I came as fast as I
could]," he said. "[There was a big root|I had to go around a tree]. Happy birthday!" And from under his shell he took
{gift}. <He had carried it all the way.>

{h} [looked at the calendar|counted on {his} {hands}] and began to laugh. "[You are not late|You are just in time],"
{he} said. "It is my birthday today. [It came again!|You are the first one here!]" [The snail was very proud.|"I knew
it," said the snail. "I only had to hurry a little at the end."] <He stayed for three days. Then he left, to be on
time for next year.>

== the echo: child paw folk
ask = Who are you? / Come out! / Where are you?

[{opening} {He} lived far from everybody, and {he} was often alone.|{H.a} lived at the foot of a high gray mountain.]
{day}, {he} shouted, "Hello!" "Hello!" said the mountain. [There was somebody!|Somebody had answered!] "{ask}" {he}
shouted. "{ask}" came the answer. <{h} looked around, but there was nobody.> "You are silly!" {he} shouted.
"[Silly|You are silly]!" said the mountain. {h} [grew angry|stamped {his} foot]. "Go away!" {he} cried. "Go away!"
cried the mountain[, and it sounded mean|].

{h} went home with wet eyes. "[The mountain is not nice to me|Somebody on the mountain hates me]," {he} said. {mom}
[put an arm around {him}|smiled]. "[Go back tomorrow and say something kind|It only gives back what you give]," said
{mom}. <"Try it with a gift that does not cost anything.">

So {h} went back and took a deep breath. "I like you!" {he} shouted. [And from every side it came|Then the whole
mountain sang], "[I like you! Like you!|Like you! Like you! Like you!]" {joy}. "[Be my friend|You are my friend]!"
{he} called. "My friend!" said the mountain[, very softly|]. <It works with people, too.>

== the bee on the nose: child paw

[{opening} {He} was afraid of bees. {day}, a bee came|{day}, {h.a} was picking flowers for {mom}. "Bzzz!" A bee came]
[close to {his} ear|right up to {his} face]. {h} [ran around the {home} three times|waved {his} arms]. [The bee
thought that it was a game, and it came along.|The bee did just the same.|The bee liked that and came after {him}.]
<{h} hid under a bucket. Bzzz! Now there were two of them under the bucket.>

"[Stand still|Do not run]," said {mom}. "[Be a flower|Just be a flower]." {h} [shut {his} eyes|stood still] and tried
to be a flower. <A flower does not shake, but {he} shook a little.> The bee sat down on {his} nose. It had [soft
little feet|a warm coat], and it tickled. It [looked at {him} with all its eyes|walked up and down]. Then it saw that
{he} was not a flower, and it flew away.

{h} opened one eye. "[It was polite|It said good morning]," {he} said. [After that, {he} greeted all bees, and they
greeted {him}, each in its own way.|"I was a good flower," {he} told {mom} at dinner. "But I had no honey."]

== the long scarf: paw child
color = red / green / blue / yellow
long = {mom} was thinking of something else / {mom} liked the sound of it / {mom} could not remember how to stop

[{opening} {mom} was making {him} a {color} scarf for the winter.|Click, click. {mom} was making a {color} scarf for
{h.full}.] It grew and grew, because {long}. When it was done, it went [around {h} twelve times|out of the door and
down the path]. "[It is a little long|It is too long]," said {h}. {He} [fell over it|stepped on it]. <The others
laughed. "Is it a scarf or a road?" they asked.>

[Then a cold wind came.|One day, a cold wind blew from the north.|Then winter came.] {His} friend {f.full}
[sneezed|came by with blue ears]. "[Come in|There is room]," said {h}, and put one end around {f}. Then came [three
mice|two small rabbits] and {g.a}. <Then came a dog that nobody knew.> There was room for all of them, and they walked
through the snow in a long {color} line, [like a train|singing]. <At the corners, they had to think.>

"[It is not too long|It is just right]," said {h}. [In the summer, they hung it between two trees and used it as a
swing.|{mom} looked at all those necks. "I see," said {mom}. "It is too short." And {mom} sat down again. Click,
click.]

== the wrong shoes: child

[{opening} {He} was big enough to put on {his} own shoes.|"I can do it by myself," said {h.full}, and {he} put on
{his} shoes.] But {he} put the left one on the right foot, and the right one on the left. <{mom} saw it and said
nothing.> Then {h} [went out|went for a walk]. {He} wanted to go straight ahead, but {his} feet wanted to [go
around|look at each other]. {He} [walked into a hedge|fell over a cat].

"[These shoes are broken|My feet are broken]," {he} said to {his} friend {f}. {F} [looked at the shoes|walked around
{him}]. "[Your shoes are angry at each other|They are looking away from each other]," said {f}. "[They do not talk.|I
think they had a quarrel.]" {h} sat down. {He} took off the shoes and [put them side by side|told them to say sorry].
Then {he} put them on again, [the other way|the left one left and the right one right].

Now they went [straight as a train|just where {he} wanted]. "[They are friends again|All better]," said {h}. [At home,
{mom} looked down. "All by yourself?" "All by myself," said {h}, "and {f} helped."|{He} ran all the way home, and
{his} feet got there at the same time.]

== the new baby: child paw

[{opening} {He} had a new baby [brother|sister].|There was a new baby in the {home} of {h.full}.] It [slept and
cried|cried and slept], and everybody [looked at it all day|said how sweet it was]. Nobody looked at {h}. {He} [stood
on one leg|built a tower up to the lamp]. "Shh," said {mom}. "[The baby is sleeping.|Not now.]" <"We can give it
back," said {h}. "It is not even done. It has no teeth.">

One [night|afternoon], the baby would not stop crying. {mom} sang to it. {mom} carried it up and down. [The neighbors
closed their windows.|Nothing helped.] {h} came in with {his} {hands} over {his} ears. {He} [looked at the small red
face|bent over the bed]. The baby looked as [sad|cross] as {he} felt. So {he} put a sock on {his} nose. "[Boo|Bloop],"
{he} said.

[The crying stopped.|All at once, it was quiet.] The baby [stared|looked at the sock]. Then it laughed. [It was its
first laugh in the whole world!|It had never laughed before!] "[It has never done that before|Do that again]," said
{mom}. {h} [did it again|did it ten times]. <The baby laughed until it got the hiccups.> [And {mom} looked at them
both, the big one and the small one.|"It likes me best," said {h}. "We can keep it."]

== the boots and the puddle: child
bird = duck / frog / sparrow

[{opening} {He} had new [red|yellow] boots, but it did not rain.|Every morning, {h.full} put on {his} new boots and
looked for rain.] [Monday was dry. Tuesday was dry.|The sky was blue, and then it was blue again.] "[Come on,
clouds|Please]," {he} said. <{He} wore the boots to breakfast. {He} wore them to bed.> {He} jumped in the bath, but
{mom} said that it was not the same, and that the floor was wet.

[At last, one night, it rained.|Then, at last, drops ran down the window.|On Friday, a cloud came, and it stayed.] In
the morning, there was a puddle in front of the house, [as round as a plate|so big that the sky fit in it]. {h} ran up
to it. But in the puddle sat a {bird}. It was [washing its feet|having a bath], and it looked so happy. <It sang a
little.> {h} stood there in {his} boots. {He} [waited|put {his} foot down again].

[It took a long time.|{He} counted to a hundred.|The church bell rang, and rang again.] <The {bird} washed behind its
ears.> Then the {bird} shook itself, [looked at {h}|said thank you], and left. "[Now|My turn]!" said {h}, and {he}
jumped, as high as {he} could. SPLASH! [The water went into both boots, and it was wonderful.|{mom} got wet, and the
cat got wet, and the sky broke into a hundred bits.]

== the other mitten: child paw
where = on {his} other {hand} / on {his} head, under {his} hat / in {his} mouth, so that {he} would not lose it

[{opening} {day}, {he} had only one mitten.|"I have only one mitten!" cried {h.full}.] {He} looked [under the bed and
over the bed|in all the drawers]. {He} looked [in the oven|behind the cat]. "[Who took my mitten|Where can it be]?"
{he} asked {mom}. {mom} [looked at {him} for a moment|smiled a funny smile]. "[What color is it|What does it look
like]?" asked {mom}.

"[Red|Blue|Green], like this one," said {h}. <"Is it warm?" "Very warm."> "And where would you put it, [so that it is
safe|so that nobody could take it]?" {h} thought. Then {he} [turned pink|began to laugh]. The mitten was {where}! "[I
found it|It was safe]," {he} said. "[I am good at hiding things|I am so clever that I fooled myself]."

== counting sheep: child paw folk
problem & then = would not jump. It was afraid & {h} had to get up and show it how / stopped to eat the flowers by the
    fence & All the others wanted some, too / was really a wolf in a sheep's coat & It said that it only liked to jump
    / got its tail stuck in the fence & {h} had to pull and pull

[{opening} One night, {he} could not sleep.|It was late, and {h.full} was wide awake.] "Count sheep," said {mom}[ with
a yawn|]. So {h} closed {his} eyes and counted. [One sheep jumped over the fence. Two. Three.|One sheep jumped. Two
sheep jumped.|The first sheep jumped very well. So did the second.] But number [four|five|six|seven] {problem}.
{then}. <The sheep behind it began to push and complain.>

"[Are you asleep|Is it working]?" asked {mom}. "No!" said {h}. "[I have too much work|They do not listen]." [It took
half the night until every sheep was over.|At last, the whole flock was on the other side.] [They were all so tired
that they lay down in a heap.|Then the sheep sat down and began to count.] "[One {kind}|That makes one {kind}]," said
the smallest sheep. <There was only one of {him} to count.> And {h} was asleep.

== the brave little leaf: leaf

[{opening} All the other leaves had turned red and danced away.|{H.a} held on to {his} branch. All {his} brothers and
sisters were gone.] "[Let go|It is time]," said the wind. "[But what is down there|And what happens then]?" asked {h}.
The wind did not know. [It never stayed long enough to see.|It had never looked.]

[Snow|Cold rain] came, and {h} [shook|held on tighter]. Under the tree lay {f.a}, [without a blanket|curled up and
cold]. {h} looked down for a long time. Then {he} let go. [Around and around {he} went. It was like a song.|{He} fell
slowly, and it was not like falling at all. It was like flying.] {He} came down right on {f.his} [ear|nose].

"[Oh, a blanket|How warm]," said {f}, half asleep. <Other leaves lay all around, and they said hello.> {h} [kept
{f.him} warm until spring|had never been so useful]. And far above, on the old branch, [there was a new green
bud|something small and green was waiting to be brave].

== the tea party: child folk

[{opening} {day}, {he} invited all {his} toys to tea.|"Tea is ready!" said {h.full}. All {his} toys sat around the
table.] There was a [bear with one eye|big brown bear], and there was [an old rag doll|a tin robot|a wooden duck], and
there were tiny cups of water. "[More tea|Some cake], sir?" asked {h}. [The bear said nothing.|The bear only smiled.]
<Bears often say nothing.> {h} [turned around to get sugar|went to get a spoon].

When {he} came back, the cups were empty! {h} [looked at the bear|looked at them all]. "[Did you drink that|Who was so
thirsty]?" {he} asked. The bear said nothing, but its [chin was wet|nose was wet|mouth was full]. {h} [told {mom}
about it|ran to get {mom}]. "[It must be the cat|You drank it and forgot]," said {mom}.

So {h} [put out four full cups and hid behind the door|watched through the keyhole]. [Nothing moved. The clock went
tick, tock.|For a long time, nobody moved.] Then {he} heard a small voice. "[Is {he} gone|Can we drink now]?" it said.
{h} [smiled and went away on {his} toes|did not open the door]. <Even toys need to be alone sometimes.>

== the slow train: train
late & why & back = a cow on the rails & The cow had a stone in her foot & the cow and all her sisters / an old man
    who waved & The old man had lost his hat & the old man and all his neighbors / a duck with six babies & The babies
    could only walk slowly & the ducks and all the frogs of the pond

[{opening} {He} was always late.|{H.a} was always the last to come home.] The fast trains went [whoosh|zoom], and they
never stopped. But {h} stopped for everything. {day}, {he} stopped for {late}. {why}. "[You will be late again|Hurry
up]!" shouted the fast trains. <"Toot," said {h}, which means, "I know.">

[That night|One winter night], snow fell, and the fast trains were stuck [on the hill|before the bridge|in the woods].
[They pulled and puffed|Their wheels turned], but they could not move. "[We are stuck|Help]!" they called. [The fields
were dark and empty.|Nobody knew them, because they had never stopped.] [Then a light came, slowly.|Then they heard a
soft toot.] It was {h}, and behind {him} came {back}, [with ropes and spades|all ready to push].

"[Who are all these|Where did you find them]?" asked the fastest train. "[I met them when I was late|These are my
friends]," said {h}. One, two, three, push! And [they all came home together|the trains were free]. [They were very,
very late, and nobody minded.|Now the fast trains stop, too, now and then, to say hello.]

== a place for the spider: child paw folk

[{opening} {He} was afraid of spiders, and one morning, there was one in {his} bath.|"Eek!" cried {h.full}. There was
a spider in {his} bath.] {h} [climbed on a chair|ran to {mom}]. "[Take it away|It has too many legs]!" {he} cried.
<The spider climbed up the side of the tub and slid down again. It tried once more and slid down.>

{mom} gave {him} a cup and a card. "[You can do it|It is more afraid than you are]," said {mom}. {h} went closer,
[inch by inch|with one eye closed]. [The spider was shaking.|The spider sat very still.] [All eight of its legs were
shaking!|It had pulled in all its legs.|It tried to make itself small.] "[Do not be afraid|I am only big on the
outside]," {he} whispered[ to it|]. And {he} put the cup over it.

{He} carried it out to [the garden gate|the rose bush]. The next morning, there was a web, and every thread had
[drops|pearls of rain] on it. [It shone like a crown.|It was the finest thing in the whole garden.] <In the middle,
one leg waved.> ["You can stay there," said {h}, "and I will keep the bath."|"Good morning," said {h}. "[Please use
your own bath from now on.|What a fine house you have.]"]
"""
